"""DeepEP's dispatcher against all-to-all, bit for bit, with a `deep_ep` that checks every call (`fake_deep_ep.py`).

Both sum the copies of a token in fp32 and round once, and both deliver rows in the same order, so that bf16 leaves no
noise between them. (`embedding_bag`, with which all-to-all sums on a CPU, rounds ties away from zero, where GPUs and
`Tensor.to` round them to even: it is made to do so here.)

Sizes: N tokens of a rank, R rows received, H hidden, K top-k, E experts of the group.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from tests import fake_deep_ep
from tests.dist import training
from tests.dist.ranks import RankError, run_ranks, with_moe_config
from tests.dist.test_dispatch import sizes_of
from tests.dist.test_parity_training import NO_TOKENS
from tests.dist.training import Job
from tests.families import model_class

H, E, K = 32, 8, 3
KINDS = {"buffer": ("Buffer", "ElasticBuffer"), "elastic": ("ElasticBuffer",)}
CASES = (
    "uneven",
    "top-1",
    "a-rank-without-tokens",
    "one-rank-takes-all",
    "no-tokens",
    "top-1, a-rank-without-tokens",
)

both = pytest.mark.parametrize("kind", KINDS)


def before_fork(job=None, **_):
    model_class(job.family if job else "qwen3_moe")


def tokens(case, rank, hidden=H):
    """x [N,H] bf16, choices [N,K], weights [N,K], and gradients for the output and for the weights received."""
    generator = torch.Generator().manual_seed(10 * CASES.index(case) + rank)
    num_tokens, top_k = sizes_of(case, rank)
    choices = torch.rand(num_tokens, E, generator=generator).argsort(1)[:, :top_k]
    if case == "one-rank-takes-all":
        choices = choices % 2
    x, upstream = torch.randn(2, num_tokens, hidden, generator=generator).bfloat16()
    return x, choices, torch.rand(choices.shape, generator=generator), upstream


def transports(kind, ep_size):
    from moe_accel.dispatch import AllToAll, DeepEP

    dist.init_process_group("gloo")
    fake_deep_ep.install(*KINDS[kind])
    group, _ = dist.new_subgroups(ep_size)
    return AllToAll(group, E // ep_size), DeepEP(group, E // ep_size)


def round_trip(transport, x, choices, weights, upstream, of_weights=torch.float32):
    """Everything that a dispatch, a combine, their backward and a repeated dispatch give."""
    x, weights = x.clone().requires_grad_(), weights.to(of_weights, copy=True).requires_grad_()
    x_r, choices_r, weights_r, handle = transport.dispatch(x, choices, weights)
    local_r = weights_r.where(choices_r >= 0, 0)
    y_r = (x_r.float() * (local_r.float() * (choices_r + 2)).sum(1, keepdim=True)).bfloat16()
    y = transport.combine(y_r, handle)
    assert not y._is_view()  # a model may add to it in place
    y.backward(upstream)
    again = transport.dispatch(x.detach(), choices, weights.detach(), handle)
    values = [x_r, choices_r, local_r, y, x.grad, weights.grad, again[0], again[1], again[2].where(choices_r >= 0, 0)]
    return [each.detach() for each in values], handle.num_pairs, again[3] is handle


def every_case(kind, ep_size):
    alltoall, deepep = transports(kind, ep_size)
    found = {}
    for case in CASES:
        given = tokens(case, dist.get_rank())
        for dtype in (torch.float32, torch.bfloat16):
            truth = round_trip(alltoall, *given, dtype)
            fake_deep_ep.CALLS.clear()
            ours = round_trip(deepep, *given, dtype)
            calls = {name: count for name, count in fake_deep_ep.CALLS.items() if not name.endswith("Buffer")}
            same = [
                (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
                for a, b in zip(*map(first, (ours, truth)), strict=True)
            ]
            found[case, dtype] = same, ours[1:] == truth[1:], calls
    left = len(fake_deep_ep.PENDING)
    alive = len(fake_deep_ep.ALIVE)
    dist.destroy_process_group()
    return found, left, alive, len(fake_deep_ep.ALIVE)


def first(pair):
    return pair[0]


@functools.cache
def on_ranks(kind, num_ranks, ep_size):
    return run_ranks(every_case, num_ranks, kind=kind, ep_size=ep_size)


LAYOUTS = pytest.mark.parametrize(("num_ranks", "ep_size"), [(2, 2), (4, 4), (4, 2)], ids=["2", "4", "2-groups-of-2"])


@both
@LAYOUTS
def test_it_delivers_sums_and_differentiates_as_all_to_all_does_bit_for_bit(kind, num_ranks, ep_size):
    for found, *_ in on_ranks(kind, num_ranks, ep_size):
        for case, (same, rest, _) in found.items():
            assert (same, rest) == ([True] * 9, True), case


@both
@LAYOUTS
def test_a_layer_dispatches_once_and_repeats_with_the_handle_in_backward_and_recompute(kind, num_ranks, ep_size):
    """A combine forward, one more as the gradient of the dispatch; a repeated dispatch as that of the combine."""
    once = {"dispatch": 1, "combine": 2, "dispatch with handle": 2} | ({"layout": 1} if kind == "buffer" else {})
    for found, *_ in on_ranks(kind, num_ranks, ep_size):
        assert [calls for *_, calls in found.values()] == [once] * len(found)


@both
@LAYOUTS
def test_every_event_is_waited_for_and_one_buffer_is_destroyed_before_its_group(kind, num_ranks, ep_size):
    for _, pending, alive, afterwards in on_ranks(kind, num_ranks, ep_size):
        assert (pending, alive, afterwards) == (0, 1, 0)


# ---- the buffer


def growing(kind):
    _, deepep = transports(kind, 2)
    other = type(deepep)(deepep.group, deepep.num_local_experts)
    found = []
    for transport, hidden in ((deepep, H), (other, 2 * H), (deepep, H), (other, 2 * H)):
        given = tokens("uneven", dist.get_rank(), hidden)
        round_trip(transport, *given)
        found.append((fake_deep_ep.CALLS["Buffer"] + fake_deep_ep.CALLS["ElasticBuffer"], len(fake_deep_ep.ALIVE)))
    return found


@both
def test_layers_share_a_buffer_that_grows_for_a_wider_model_and_never_shrinks(kind):
    assert run_ranks(growing, 2, kind=kind) == [[(1, 1), (2, 1), (2, 1), (2, 1)]] * 2


def a_handle_survives():
    _, deepep = transports("buffer", 2)
    x, choices, weights, _ = tokens("uneven", dist.get_rank())
    x_r, _, _, handle = deepep.dispatch(x, choices, weights)
    deepep.open(1, 4 * H, K)
    return torch.equal(deepep.dispatch(x, choices, weights, handle)[0], x_r)


def test_a_handle_outlives_the_buffer_that_made_it():
    assert run_ranks(a_handle_survives, 2) == [True, True]


def number_of_sms():
    _, deepep = transports("buffer", 2)
    given = tokens("uneven", dist.get_rank())
    deepep.open(1, H, K)
    fake_deep_ep.Buffer.num_sms = 8
    round_trip(deepep, *given)
    return "kept"


def test_a_later_set_num_sms_does_not_part_dispatch_from_combine():
    assert run_ranks(number_of_sms, 2) == ["kept", "kept"]


def tokens_of_one_rank_grow():
    """Room for more tokens than this rank has: another one has them."""
    _, deepep = transports("elastic", 2)
    rooms = []
    for num_tokens in (5, 200, 5, 1000):
        mine = num_tokens if dist.get_rank() else 3
        choices = torch.zeros(mine, 1, dtype=torch.int64)
        deepep.dispatch(torch.zeros(mine, H, dtype=torch.bfloat16), choices, torch.ones(mine, 1))
        rooms.append(deepep.buffers.room[0])
    return rooms


def test_elastic_ranks_agree_about_the_most_tokens_of_any_of_them():
    assert run_ranks(tokens_of_one_rank_grow, 2) == [[128, 256, 256, 1024]] * 2


def failing_on_the_way():
    _, deepep = transports("buffer", 2)
    deepep.open(1, H, K)
    try:
        raise KeyError("in training")
    except KeyError:
        dist.destroy_process_group()  # as in a script's `finally`
    return len(fake_deep_ep.ALIVE)


def test_after_an_error_nobody_waits_for_the_other_ranks():
    assert run_ranks(failing_on_the_way, 2) == [1, 1]


# ---- dtypes


def sent(dtype, autocast):
    _, deepep = transports("buffer", 2)
    x, choices, weights, upstream = tokens("uneven", dist.get_rank())
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_r, _, weights_r, handle = deepep.dispatch(x, choices, weights.requires_grad_())
        y = deepep.combine(x_r * weights_r.sum(1, keepdim=True), handle)
    y.backward(upstream.to(dtype))
    return x_r.dtype, y.dtype, x.grad.dtype


def test_under_autocast_fp32_travels_as_bf16_and_comes_back_as_fp32():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert run_ranks(sent, 2, dtype=fp32, autocast=True) == [(bf16, fp32, fp32)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_it_anything_but_bf16_is_refused(dtype):
    with pytest.raises(RankError, match=rf"sends bf16, and the hidden states are {str(dtype)[6:]}\n\nhint: mixed_prec"):
        run_ranks(sent, 2, dtype=dtype, autocast=False)


# ---- whole training


def trained(job, kind, **how):
    if kind:
        fake_deep_ep.install(*KINDS[kind])
    result = training.on_ranks(job, mixed_precision="bf16", **how)
    counts = dict(fake_deep_ep.CALLS)
    dist.destroy_process_group()
    return result, counts, len(fake_deep_ep.ALIVE)


def train(job, ep_size, kind=None, **how):
    launch = with_moe_config(ep_size=ep_size, dispatcher="deepep" if kind else "alltoall")
    return run_ranks(trained, len(job.lengths), launch, job=job, kind=kind, **how)


@functools.cache
def with_alltoall(job, ep_size):
    return train(job, ep_size)


TWO_RANKS = (training.SEQUENCE,) * 2
SKEWED = Job(routing="one-expert-takes-all")
JOBS = {
    "2-ranks": (Job(lengths=TWO_RANKS), 2, {}),
    "4-ranks": (Job(), 4, {}),
    "4-ranks-in-2-groups": (Job(), 2, {}),
    "skewed": (SKEWED, 4, {}),
    "empty-experts": (Job(routing="empty-experts", lengths=TWO_RANKS), 2, {}),
    "an-empty-rank": (NO_TOKENS, 4, {}),
    "accumulate": (Job(accumulate=2, lengths=TWO_RANKS), 2, {}),
    "checkpointing": (Job(), 4, {"gradient_checkpointing": "non-reentrant"}),
    "checkpointing-reentrant": (Job(lengths=TWO_RANKS), 2, {"gradient_checkpointing": "reentrant"}),
    "checkpointing-skewed": (SKEWED, 4, {"gradient_checkpointing": "non-reentrant"}),
    "shared-experts-first": (Job("qwen2_moe", lengths=TWO_RANKS), 2, {"gradient_checkpointing": "non-reentrant"}),
    "shared-experts-last": (Job("deepseek_v3", lengths=TWO_RANKS), 2, {"gradient_checkpointing": "non-reentrant"}),
    "checkpointing-an-empty-rank": (NO_TOKENS, 4, {"gradient_checkpointing": "non-reentrant"}),
}
WITH_ELASTIC = {"4-ranks-in-2-groups", "an-empty-rank", "accumulate", "checkpointing", "checkpointing-skewed"}
WITH_ELASTIC |= {"shared-experts-first"}
"""The default run tries these with ElasticBuffer and the others with Buffer; the rest is `slow`."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=() if quick else pytest.mark.slow)
        for name in JOBS
        for kind in KINDS
        for quick in [(name in WITH_ELASTIC) == (kind == "elastic")]
    ],
)
def test_training_is_that_with_all_to_all_bit_for_bit(kind, name):
    """Losses of all steps, gradients of the first, norms, and the weights after the last."""
    job, ep_size, how = JOBS[name]
    truth = with_alltoall(job, ep_size)
    ours = train(job, ep_size, kind, **how)
    for (tried, _, alive), (true, *_) in zip(ours, truth, strict=True):
        assert (tried.losses, tried.norms, alive) == (true.losses, true.norms, 0)
    (tried, *_), (true, *_) = ours[0], truth[0]
    assert tried.gradients.keys() == true.gradients.keys()
    for ours_of, truth_of in ((tried.gradients, true.gradients), (tried.weights, true.weights)):
        assert [name for name, tensor in truth_of.items() if not torch.equal(ours_of[name], tensor)] == []


@pytest.mark.parametrize("how", [None, "non-reentrant"])
def test_recompute_takes_up_the_handle_of_forward(how):
    """Two layers, three steps: as many layouts as forwards; recompute adds repeated dispatches alone."""
    _, counts, _ = train(Job(lengths=TWO_RANKS), 2, "buffer", gradient_checkpointing=how)[0]
    assert (counts["layout"], counts["dispatch"]) == (6, 6)
    assert counts["dispatch with handle"] == (12 if how else 6)


def test_at_ep_size_1_deep_ep_is_not_even_looked_for():
    counts = [counts for _, counts, _ in train(Job(lengths=TWO_RANKS), 1, "buffer")]
    assert counts == [{}, {}]


def test_training_is_that_of_ep_size_1_within_bf16():
    from tests.dist.test_parity_bf16 import EPS, TENSOR_TOLERANCE, WHOLE_TOLERANCE, flat, relative_error

    truth, tried = (train(Job(), *given) for given in ((1,), (4, "buffer")))
    for step in range(3):
        mean = [sum(rank[0].losses[step] for rank in ranks) / 4 for ranks in (tried, truth)]
        assert mean[0] == pytest.approx(mean[1], rel=2 * EPS)
    ours, true = tried[0][0].gradients, truth[0][0].gradients
    assert {name for name in true if relative_error(ours[name], true[name]) > TENSOR_TOLERANCE} == set()
    assert relative_error(flat(ours), flat(true)) < WHOLE_TOLERANCE
