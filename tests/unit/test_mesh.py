"""Every divisibility rule: what is refused, with which sizes as the remedy; that all others pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_accel.errors import ConfigError
from moe_accel.mesh import check_experts, check_ranks, divisors


def told(error):
    """Message and hint of a raised error."""
    return error.value.message, error.value.hint


REFUSED_RANKS = {
    "ep": ((3, 8, 1, 1), "ep_size=3 must divide num_processes=8", "ep_size: any of [1, 2, 4, 8]"),
    "ep-over-all": ((16, 8, 1, 1), "ep_size=16 must divide num_processes=8", "ep_size: any of [1, 2, 4, 8]"),
    "replicas": ((1, 8, 3, 1), "dp_replicate_size=3 must divide the 8 data-parallel ranks", "any of [1, 2, 4, 8]"),
    "ep-in-a-replica": (
        (8, 8, 2, 1),
        "ep_size=8 must divide the 4 ranks that FSDP shards over (num_processes=8 / 2)",
        "ep_size: any of [1, 2, 4]",
    ),
    "ep-beside-tensor-parallelism": (
        (4, 8, 2, 2),
        "ep_size=4 must divide the 2 ranks that FSDP shards over (num_processes=8 / 4)",
        "ep_size: any of [1, 2]",
    ),
    "replicas-beside-tensor-parallelism": (
        (1, 8, 8, 2),
        "dp_replicate_size=8 must divide the 4 data-parallel ranks",
        "any of [1, 2, 4]",
    ),
}


@pytest.mark.parametrize(("sizes", "message", "hint"), REFUSED_RANKS.values(), ids=REFUSED_RANKS)
def test_sizes_that_do_not_divide_the_ranks_are_refused_with_those_that_do(sizes, message, hint):
    with pytest.raises(ConfigError) as error:
        check_ranks(*sizes)
    assert told(error) == (message, hint)


sizes = st.integers(1, 6)


@given(efsdp=sizes, ep=sizes, replicas=sizes, others=sizes)
def test_what_multiplies_up_to_the_ranks_passes_and_leaves_the_rest_to_shard_over(efsdp, ep, replicas, others):
    assert check_ranks(ep, efsdp * ep * replicas * others, replicas, others) == efsdp * ep


@given(ep=st.integers(1, 40), ranks=st.integers(1, 40))
def test_an_ep_size_passes_exactly_if_it_is_one_of_those_offered(ep, ranks):
    if ep in divisors(ranks):
        assert check_ranks(ep, ranks, 1) == ranks
        return
    with pytest.raises(ConfigError) as error:
        check_ranks(ep, ranks, 1)
    assert error.value.hint == f"ep_size: any of {divisors(ranks)}"


REFUSED_EXPERTS = {
    "one-size": ((8, [12, 12], 16), "num_experts=12", "[1, 2, 4]"),
    "layers-differ": ((4, [8, 6, 8], 8), "num_experts=6", "[1, 2]"),
    "several-do-not-fit": ((8, [12, 64, 20], 8), "num_experts=12, 20", "[1, 2, 4]"),
    "fewer-experts-than-ranks": ((8, [4], 8), "num_experts=4", "[1, 2, 4]"),
    "only-one-fits": ((2, [7], 4), "num_experts=7", "[1]"),
    "ranks-allow-less": ((6, [8], 6), "num_experts=8", "[1, 2]"),
}


@pytest.mark.parametrize(("given_sizes", "counts", "fitting"), REFUSED_EXPERTS.values(), ids=REFUSED_EXPERTS)
def test_experts_that_do_not_split_evenly_are_refused_with_the_sizes_that_fit_model_and_ranks(
    given_sizes, counts, fitting
):
    with pytest.raises(ConfigError) as error:
        check_experts(*given_sizes)
    assert told(error) == (
        f"ep_size={given_sizes[0]} must divide {counts}",
        f"ep_size: any of {fitting} fits this model on these ranks",
    )


@given(ep=sizes, counts=st.lists(sizes, min_size=1, max_size=4), ranks=st.integers(1, 12))
def test_experts_pass_exactly_if_each_layers_split_evenly(ep, counts, ranks):
    fits = all(count % ep == 0 for count in counts)
    if fits:
        check_experts(ep, counts, ranks)
        return
    with pytest.raises(ConfigError):
        check_experts(ep, counts, ranks)


def test_divisors_are_all_and_ascend():
    assert [divisors(number) for number in (1, 7, 12)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12]]
