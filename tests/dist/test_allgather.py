"""The dispatcher whose sizes are known beforehand: the contract of `test_dispatch.py`, with all tokens on all ranks.

Sizes: N tokens of a rank, H hidden, K top-k, E experts of the group.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import run_ranks
from tests.dist.test_dispatch import DTYPES, LAYOUTS, TOLERANCE, Counting, E, H, K, computed

N = 4


def dispatcher_of(ep_size):
    from moe_accel.dispatch import AllGather

    dist.init_process_group("gloo")
    group, _ = dist.new_subgroups(ep_size)
    return AllGather(group, E // ep_size)


def tokens(rank):
    """A rank's x [N,H], choices [N,K], weights [N,K] and a gradient [N,H] for its output."""
    generator = torch.Generator().manual_seed(rank)
    choices = torch.rand(N, E, generator=generator).argsort(dim=1)[:, :K]
    floats = torch.randn(N, 2 * H + K, generator=generator, dtype=torch.float64)
    x, weights, upstream = floats.split([H, K, H], dim=1)
    return x, choices, weights, upstream


def there_and_back(ep_size):
    dispatcher = dispatcher_of(ep_size)
    x, choices, weights, upstream = tokens(dist.get_rank())
    x, weights = x.requires_grad_(), weights.contiguous().requires_grad_()
    beside = []
    with Counting() as first:
        given = dispatcher.dispatch(x, choices, weights, beside=lambda: beside.append(1), scale=2.0)
    x_r, choices_r, weights_r, handle = given
    y_r = computed(x_r, choices_r, weights_r, dispatcher.rank * dispatcher.num_local_experts)
    with Counting() as back:
        y = dispatcher.combine(y_r, handle, 0.5)
    with Counting() as backward:
        y.backward(upstream)
    with Counting() as again:
        repeated = dispatcher.dispatch(x.detach(), choices, weights.detach(), handle)
    return {
        "place": dispatcher.rank,
        "received": [x_r.detach(), choices_r, weights_r.detach()],
        "num_pairs": handle.num_pairs,
        "calls": [dict(each.calls) for each in (first, back, backward, again)],
        "results": [y.detach(), x.grad, weights.grad],
        "repeated": [torch.equal(a, b) for a, b in zip(repeated[:3], given[:3], strict=True)],
        "beside": len(beside),
    }


@functools.cache
def on_ranks(layout):
    num_ranks, ep_size = LAYOUTS[layout]
    return run_ranks(there_and_back, num_ranks, ep_size=ep_size), ep_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tokens_arrive_at_each_rank_which_knows_its_own_experts(layout):
    results, ep_size = on_ranks(layout)
    for rank, result in enumerate(results):
        assert result["place"] == rank % ep_size
        first, num_local = rank // ep_size * ep_size, E // ep_size
        x, choices, weights, _ = (
            torch.cat(each) for each in zip(*map(tokens, range(first, first + ep_size)), strict=True)
        )
        local = choices - result["place"] * num_local
        local = local.masked_fill((local < 0) | (local >= num_local), -1).int()
        assert all(map(torch.equal, result["received"], (x, local, weights)))
        assert result["num_pairs"] is None
        assert result["beside"] == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_are_those_of_a_process_that_has_all_experts(layout):
    """Gradients twice in dispatch and half in combine."""
    for rank, result in enumerate(on_ranks(layout)[0]):
        x, choices, weights, upstream = tokens(rank)
        x, weights = x.requires_grad_(), weights.contiguous().requires_grad_()
        y = computed(x, choices, weights)
        y.backward(upstream)
        for name, found, truth in zip("yxw", result["results"], (y.detach(), x.grad, weights.grad), strict=True):
            torch.testing.assert_close(
                found, truth, rtol=0, atol=TOLERANCE, msg=lambda said, name=name: f"{name}: {said}"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_waits_for_the_device_and_the_same_comes_again(layout):
    for result in on_ranks(layout)[0]:
        first, combine, backward, again = result["calls"]
        assert first == again == {"_allgather_base_": 2}
        assert combine == {"alltoall_base_": 1}
        assert backward == {"_allgather_base_": 1, "alltoall_base_": 2}
        assert result["repeated"] == [True] * 3


def every_dtype():
    dispatcher = dispatcher_of(2)
    found = {}
    for name, (of_x, of_weights) in DTYPES.items():
        x, choices, weights, upstream = tokens(dist.get_rank())
        x, weights = x.to(of_x).requires_grad_(), weights.to(of_weights).requires_grad_()
        x_r, choices_r, weights_r, handle = dispatcher.dispatch(x, choices, weights)
        y = dispatcher.combine(x_r * weights_r.sum(1, keepdim=True).to(of_x), handle)
        y.backward(upstream.to(of_x))
        exact = torch.equal(weights_r, torch.cat([tokens(rank)[2] for rank in (0, 1)]).to(of_weights))
        found[name] = [x_r.dtype, weights_r.dtype, y.dtype, x.grad.dtype, weights.grad.dtype, choices_r.dtype], exact
    return found


def test_tokens_and_weights_keep_their_dtypes_both_ways():
    for found in run_ranks(every_dtype, 2):
        for name, (of_x, of_weights) in DTYPES.items():
            assert found[name] == ([of_x, of_weights, of_x, of_x, of_weights, torch.int32], True), name
