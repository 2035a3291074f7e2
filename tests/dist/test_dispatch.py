"""The all-to-all dispatcher's contract, against a twin in plain Python that sees the tokens of all ranks.

Sizes: N tokens of a rank, R rows received, H hidden, K top-k, E experts of the group, e experts of a rank.
"""

import functools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.ranks import run_ranks

H, E, K = 5, 8, 3

CASES = (
    "uneven",
    "top-1",
    "int32-choices",
    "an-expert-twice",
    "a-rank-without-tokens",
    "one-rank-takes-all",
    "no-tokens",
    "top-1, a-rank-without-tokens",
)
LAYOUTS = {"2-ranks": (2, 2), "4-ranks": (4, 4), "4-ranks-in-2-groups": (4, 2)}
"""Ranks, and ranks of a group."""

TOLERANCE = 100 * torch.finfo(torch.float64).eps
"""Largest error of a sum of at most 8 products of values near 1, each a tanh of 5 products: some 50 roundings."""

DTYPES = {"x-bf16": (torch.bfloat16, torch.float32), "all-bf16": (torch.bfloat16, torch.bfloat16)}
DTYPES |= {"all-fp32": (torch.float32, torch.float32), "all-fp64": (torch.float64, torch.float64)}
"""Of tokens and of routing weights."""


def sizes_of(case, rank):
    """A rank's N and K."""
    num_tokens = 0 if case == "no-tokens" else 3 + 2 * rank
    if "a-rank-without-tokens" in case:
        num_tokens = 0 if rank == 1 else 4
    return num_tokens, 1 if "top-1" in case else K


def tokens(case, rank):
    """A rank's x [N,H], choices [N,K], weights [N,K] and a gradient [N,H] for its output."""
    generator = torch.Generator().manual_seed(10 * CASES.index(case) + rank)
    num_tokens, top_k = sizes_of(case, rank)
    choices = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :top_k]
    if case == "an-expert-twice":
        choices[:, 1] = choices[:, 0]
    if case == "one-rank-takes-all":
        choices = choices % 2
    if case == "int32-choices":
        choices = choices.int()
    floats = torch.randn(num_tokens, 2 * H + top_k, generator=generator, dtype=torch.float64)
    x, weights, upstream = floats.split([H, top_k, H], dim=1)
    return x, choices, weights, upstream


def expert_matrices():
    """[E,H,H]: expert i computes tanh(x @ matrix i)."""
    return torch.randn(E, H, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / H**0.5


def computed(x, choices, weights, first=0):
    """Weighted sum of each row's experts: choices [R,K], counted from expert `first` on, -1 for none."""
    matrices = expert_matrices()
    y = x * 0 + (weights * 0).sum(1, keepdim=True)  # without any row, too, a gradient goes back
    for k in range(choices.shape[1]):
        for row in range(choices.shape[0]):
            expert = int(choices[row, k])
            if expert >= 0:
                y = y.index_add(
                    0, torch.tensor([row]), (weights[row, k] * torch.tanh(x[row] @ matrices[first + expert]))[None]
                )
    return y


# ---- the twin


def received_by_twin(case, group_ranks, place):
    """What rank `place` of a group gets: x_r, choices_r, weights_r; sources in order, their tokens in order."""
    num_local = E // len(group_ranks)
    local = range(place * num_local, (place + 1) * num_local)
    rows = []
    for rank in group_ranks:
        x, choices, weights, _ = tokens(case, rank)
        for n in range(x.shape[0]):
            if any(expert in local for expert in choices[n].tolist()):
                here = [expert - local.start if expert in local else -1 for expert in choices[n].tolist()]
                rows.append((x[n], torch.tensor(here), weights[n]))
    return [torch.stack(each) for each in zip(*rows, strict=True)] if rows else None


def dense(case, rank):
    """Output and gradients of x and weights, by a process that has all experts."""
    x, choices, weights, upstream = tokens(case, rank)
    x, weights = x.requires_grad_(), weights.contiguous().requires_grad_()
    y = computed(x, choices, weights)
    y.backward(upstream)
    return y.detach(), x.grad, weights.grad


# ---- on ranks


class Counting(TorchDispatchMode):
    """Counts collectives, and what makes the host wait for a device: copies to it, and outputs of unknown size."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "is_nonzero", "tolist")

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "c10d" or name in self.WAITS:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        tolist = torch.Tensor.tolist  # reads memory without any operator

        def counted(tensor):
            self.calls["tolist"] += 1
            return tolist(tensor)

        self.patch = mock.patch.object(torch.Tensor, "tolist", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


def dispatcher_of(ep_size):
    from moe_accel.dispatch import AllToAll

    dist.init_process_group("gloo")
    group, _ = dist.new_subgroups(ep_size)
    return AllToAll(group, E // ep_size)


def every_case(ep_size):
    """For each case: what was received, counted, computed, and what a second dispatch with the handle gave."""
    dispatcher = dispatcher_of(ep_size)
    return {case: one_case(dispatcher, *tokens(case, dist.get_rank())) for case in CASES}


def one_case(dispatcher, x, choices, weights, upstream):
    x, weights = x.requires_grad_(), weights.contiguous().requires_grad_()
    with Counting() as first:
        x_r, choices_r, weights_r, handle = dispatcher.dispatch(x, choices, weights)
    y_r = computed(x_r, choices_r, weights_r, dispatcher.rank * dispatcher.num_local_experts)
    with Counting() as back:
        y = dispatcher.combine(y_r, handle)
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
        "repeated": [torch.equal(a, b) for a, b in zip(repeated[:3], (x_r, choices_r, weights_r), strict=True)],
        "same_handle": repeated[3] is handle,
    }


@functools.cache
def on_ranks(layout):
    """Results of every case on every rank, with the ranks of its group."""
    num_ranks, ep_size = LAYOUTS[layout]
    results = run_ranks(every_case, num_ranks, ep_size=ep_size)
    groups = [list(range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size)) for rank in range(num_ranks)]
    return list(zip(results, groups, strict=True))


ALL = pytest.mark.parametrize("layout", LAYOUTS)
EACH_CASE = pytest.mark.parametrize("case", CASES)


@ALL
@EACH_CASE
def test_each_token_arrives_once_at_each_rank_that_has_an_expert_of_it(layout, case):
    for rank, (results, group) in enumerate(on_ranks(layout)):
        result = results[case]
        assert result["place"] == group.index(rank)
        x_r, choices_r, weights_r = result["received"]
        truth = received_by_twin(case, group, result["place"])
        if truth is None:
            top_k = tokens(case, 0)[1].shape[1]
            assert [each.shape for each in result["received"]] == [(0, H), (0, top_k), (0, top_k)]
        else:
            assert torch.equal(x_r, truth[0])
            assert torch.equal(choices_r, truth[1].int())
            assert torch.equal(weights_r, truth[2])
        assert choices_r.dtype == torch.int32
        assert result["num_pairs"] == int((choices_r >= 0).sum())
        assert isinstance(result["num_pairs"], int)


@ALL
@EACH_CASE
def test_output_and_gradients_are_those_of_a_process_that_has_all_experts(layout, case):
    """Which takes, too, that combine sums the rows that came back, and that each rank sends one row for each it got."""
    for rank, (results, _) in enumerate(on_ranks(layout)):
        for name, ours, truth in zip(("y", "x", "weights"), results[case]["results"], dense(case, rank), strict=True):
            torch.testing.assert_close(
                ours, truth, rtol=0, atol=TOLERANCE, msg=lambda said, name=name: f"{name}: {said}"
            )


@ALL
@EACH_CASE
def test_a_dispatch_takes_two_collectives_and_one_wait_and_with_the_handle_one_and_none(layout, case):
    """Row counts, then rows with all that belongs to them; again only those. Backward sends back what forward sent."""
    for results, _ in on_ranks(layout):
        first, combine, backward, again = results[case]["calls"]
        assert first == {"alltoall_base_": 2, "tolist": 1}
        assert combine == {"alltoall_base_": 1}
        assert backward == {"alltoall_base_": 2}
        assert again == {"alltoall_base_": 1}


@ALL
@EACH_CASE
def test_with_the_handle_the_same_comes_again_bit_for_bit(layout, case):
    for results, _ in on_ranks(layout):
        assert (results[case]["repeated"], results[case]["same_handle"]) == ([True] * 3, True)


def test_the_cases_are_what_they_are_called():
    """In 4 ranks: some rank is sent nothing, some token has all its experts on one rank, some an expert twice."""
    ranks = range(4)
    assert {tokens("a-rank-without-tokens", rank)[0].shape[0] for rank in ranks} == {0, 4}
    assert [received_by_twin("one-rank-takes-all", ranks, place) is None for place in ranks] == [False] + [True] * 3
    assert all(received_by_twin("no-tokens", ranks, place) is None for place in ranks)
    assert all(len(set(row)) == 2 for rank in ranks for row in tokens("an-expert-twice", rank)[1].tolist())
    per_token = [len({expert // 2 for expert in row}) for rank in ranks for row in tokens("uneven", rank)[1].tolist()]
    assert {1, 2, 3} & set(per_token) == {2, 3}


# ---- dtypes


def every_dtype():
    """For each pair of dtypes: those of what arrives and of the gradients, and whether values came unrounded."""
    dispatcher = dispatcher_of(2)
    found = {}
    for name, (of_x, of_weights) in DTYPES.items():
        x, choices, weights, upstream = tokens("uneven", dist.get_rank())
        x, weights = x.to(of_x).requires_grad_(), weights.to(of_weights).requires_grad_()
        x_r, _, weights_r, handle = dispatcher.dispatch(x, choices, weights)
        y = dispatcher.combine(x_r * weights_r.sum(1, keepdim=True).to(of_x), handle)
        y.backward(upstream.to(of_x))
        truth = received_by_twin("uneven", [0, 1], dispatcher.rank)
        exact = torch.equal(x_r, truth[0].to(of_x)) and torch.equal(weights_r, truth[2].to(of_weights))
        found[name] = [x_r.dtype, weights_r.dtype, y.dtype, x.grad.dtype, weights.grad.dtype], exact
    return found


def test_tokens_and_weights_keep_their_dtypes_both_ways():
    for found in run_ranks(every_dtype, 2):
        for name, (of_x, of_weights) in DTYPES.items():
            assert found[name] == ([of_x, of_weights, of_x, of_x, of_weights], True), name
