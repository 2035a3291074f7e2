"""Rows that are handed on while they are under way are read by nobody before they are there.

What stands for the transport here brings nothing before somebody waits for it: until then there is NaN.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import run_ranks

N, H, K, E = 6, 16, 2, 8
CHOICES, ROWS = f"{2 * K} columns", f"{H} columns"
FORWARD = [CHOICES, "sorted", ROWS]


def before_fork(**_):
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import moe_accel.experts  # noqa: F401


class Late:
    """An exchange that is made when somebody waits for it."""

    def __init__(self, log, make, received):
        self.log, self.make, self.received = log, make, received
        received.fill_(torch.nan)

    def wait(self):
        self.log.append(f"{self.received.shape[1]} columns")
        with torch.no_grad():
            self.make(self.received.data)


def bring_late(log):
    from moe_accel.dispatch import allgather

    gather = allgather._all_gather

    def all_gather(received, rows, group, async_op):
        assert async_op
        return Late(log, lambda into: gather(into, rows, group=group), received)

    allgather._all_gather = all_gather


def write_down(log, owner, name, what):
    function = getattr(owner, name)

    def logged(*args, **kwargs):
        log.append(what)
        return function(*args, **kwargs)

    setattr(owner, name, logged)


def both_ways(gathers, autocasts):
    """Output and gradients in sizes that are data and in known ones; what happened when in those."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    from moe_accel import experts
    from moe_accel.dispatch import AllGather, AllToAll
    from moe_accel.experts import function, gated, gathered

    dist.init_process_group("gloo")
    group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    num_local = E // num_ranks
    torch.manual_seed(0)
    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=8, num_experts=E))
    for parameter in module.parameters():
        whole = torch.randn(parameter.shape) / 4
        parameter.data = whole[rank * num_local : (rank + 1) * num_local].contiguous()
    transports = {"dispatcher": AllToAll(group, num_local), "of_known_sizes": AllGather(group, num_local)}
    experts.install(module, experts.Settings(ep_size=num_ranks, ep_rank=rank, **transports))
    log = []
    bring_late(log)
    write_down(log, function, "sort_with_room", "sorted")
    if gathers:
        gated.gathers = lambda *_: True
        write_down(log, gathered, "up_glu", "product")
    else:
        write_down(log, gated.Projection, "product", "product")
    torch.manual_seed(1 + rank)
    x, weights, upstream = torch.randn(N, H), torch.rand(N, K), torch.randn(N, H)
    choices, found = torch.rand(N, E).argsort(1)[:, :K], []
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    for sizes in (nullcontext, experts.known_sizes):
        log.clear()
        with sizes(), torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            y = function.experts_forward(module, x, choices, weights)
        log.append("backward")
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream)])
    return found, log


@pytest.mark.parametrize(
    ("gathers", "autocasts", "rest"),
    [
        (False, False, ["product", "product", "backward", "product", ROWS, "product", "product"]),
        (True, False, ["product", "backward", "product", ROWS]),
        # cast on its way to the experts, so it has to be there before
        (False, True, ["product", "product", "backward", ROWS, "product", "product", "product"]),
    ],
    ids=["apart", "gathered", "autocast"],
)
def test_what_needs_no_rows_is_computed_before_they_are_waited_for(gathers, autocasts, rest):
    for found, log in run_ranks(both_ways, 2, gathers=gathers, autocasts=autocasts):
        assert log == FORWARD + rest
        for usual, known in zip(*found, strict=True):
            torch.testing.assert_close(known, usual, **({"rtol": 2e-2, "atol": 2e-2} if autocasts else {}))


def failing():
    """What has arrived when the script goes on after an error behind a dispatch."""
    from types import SimpleNamespace

    from moe_accel.dispatch import AllGather
    from moe_accel.experts import Settings, function

    dist.init_process_group("gloo")
    log, transport = [], AllGather(dist.group.WORLD, E // 2)
    bring_late(log)

    def fail(*_):
        raise ValueError

    function.sort_with_room = fail
    settings = Settings(ep_size=2, ep_rank=dist.get_rank(), of_known_sizes=transport)
    given = torch.randn(N, H), torch.rand(N, E).argsort(1)[:, :K], torch.rand(N, K)
    with pytest.raises(ValueError):
        function._with_known_sizes(SimpleNamespace(num_experts=E), settings, *given)
    return log


def test_after_an_error_nothing_is_written_any_more():
    assert run_ranks(failing, 2) == [[CHOICES, ROWS]] * 2


def of_gloo():
    from moe_accel.ranks import urgent

    dist.init_process_group("gloo")
    pair, _ = dist.new_subgroups(2)
    return urgent(dist.group.WORLD) is dist.group.WORLD, urgent(pair) is pair


def test_ranks_of_gloo_have_nothing_urgent():
    assert run_ranks(of_gloo, 2) == [(True, True)] * 2
