"""The transport that needs nothing: `all_to_all_single` of torch.distributed, on NCCL, gloo or any other backend.

A token goes once to each rank that holds any of its experts, however many of them: with 128 experts on 8 ranks and
K = 8 that is 5.3 rows a token instead of 8 (8 * (1 - (7/8)^8), for uniform routing). Its routing weights and choices
travel in the same row (`message.py`). One copy from the device to the host a layer, for the row counts that torch wants
as python numbers; none when a handle is given. The counts are on their way as soon as there are choices, and where rows
go is worked out meanwhile, without them.

Sizes: N tokens of this rank, S rows sent, R rows received, G ranks, H hidden, K top-k, e experts of each rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch.halves import Exchange, scaled, travel
from moe_accel.dispatch.message import Layout, pack, pack_gradients, unpack
from moe_accel.dispatch.plan import count, cut, order
from moe_accel.kernels.rows import RowMap, gather, sum_copies


@dataclass(frozen=True)
class Plan:
    """Which rows a dispatch sends where, and how many come.

    Attributes:
        rows: the S sent copies of this rank's N tokens, ordered by receiving rank, then by token.
        ranks: [S], where each goes.
        send_counts: rows sent to each rank.
        receive_counts: rows received from each rank.
        num_pairs: choices of received rows that are of this rank's experts.
    """

    rows: RowMap
    ranks: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    num_pairs: int


@dataclass(frozen=True)
class AllToAllHandle:
    """What a dispatch leaves.

    Attributes:
        choices: [R,K] int32, local expert of each choice of a received row, -1 where another rank has it.
        plan: where the rows went and came from.
    """

    choices: Tensor
    plan: Plan

    @property
    def num_pairs(self) -> int:
        """How many of `choices` are not -1."""
        return self.plan.num_pairs


class AllToAll:
    """Dispatcher over the ranks of one process group, each holding `num_local_experts` consecutive experts."""

    name = "alltoall"

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int):
        self.group, self.num_local_experts = group, num_local_experts
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def dispatch(
        self,
        x: Tensor,
        choices: Tensor,
        weights: Tensor,
        handle: AllToAllHandle | None = None,
        beside: Callable[[], Any] | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, AllToAllHandle]:
        """See `Dispatcher.dispatch`."""
        plan = self._plan(choices) if handle is None else handle.plan
        transfer = _Transfer(self, plan, choices, handle)
        x_r, weights_r = travel(x, weights, transfer, beside, scale)
        return x_r, transfer.handle.choices, weights_r, transfer.handle

    def combine(self, y: Tensor, handle: AllToAllHandle, scale: float = 1.0, keep: Any = None) -> Tensor:
        """See `Dispatcher.combine`."""
        combined: Any = _Combine.apply(y, handle.plan, self.group, scale, keep)
        return combined

    @torch.no_grad()
    def _plan(self, choices: Tensor) -> Plan:
        counted = count(choices, self.num_ranks, self.num_local_experts)
        received = torch.empty_like(counted.counts)
        counting: Any = dist.all_to_all_single(received, counted.counts, group=self.group, async_op=True)
        rows, ranks = order(counted)
        counting.wait()
        counts = torch.cat([counted.counts, received], dim=1).tolist()  # the one wait for the device
        send_counts, receive_counts = [row[0] for row in counts], [row[2] for row in counts]
        num_rows, num_pairs = sum(send_counts), sum(row[3] for row in counts)
        return Plan(cut(rows, num_rows), ranks[:num_rows], send_counts, receive_counts, num_pairs)


class _Transfer:
    """Rows with their routing weights and choices on the way, and the gradients of the first two on the way back; see
    `halves.Transfer`. A weight goes along to every rank its token goes to; only the rank that has the expert gives it a
    gradient.

    Until the current stream waits for an exchange, both its sides are kept alive here.
    """

    needs: tuple[bool, bool] = False, False

    def __init__(self, transport: AllToAll, plan: Plan, choices: Tensor, handle: AllToAllHandle | None):
        self.group, self.num_local_experts, self.plan = transport.group, transport.num_local_experts, plan
        self.choices, self.known = choices, handle
        self.under_way: Exchange | None = None
        self.layout: Layout | None = None

    @property
    def handle(self) -> AllToAllHandle:
        """Of this dispatch, once it has arrived."""
        assert self.known is not None
        return self.known

    def launch(self, x: Tensor, weights: Tensor) -> None:
        plan, choices = self.plan, None if self.known is not None else self.choices
        packed, self.layout = pack(x, weights, choices, plan.rows, plan.ranks, self.num_local_experts)
        self.under_way = _start(packed, plan.send_counts, plan.receive_counts, self.group)

    def arrive(self) -> tuple[Tensor, Tensor]:
        assert self.layout is not None
        x, weights, choices = unpack(self._arrived(), self.layout)
        if choices is not None:
            self.known = AllToAllHandle(choices, self.plan)
        return x, weights

    def launch_back(self, x_grad: Tensor, weights_grad: Tensor) -> None:
        self.layout = None
        if all(self.needs):
            rows, self.layout = pack_gradients(x_grad, weights_grad)
        else:
            rows = x_grad if self.needs[0] else weights_grad
        self.under_way = _start(rows, self.plan.receive_counts, self.plan.send_counts, self.group)

    def arrive_back(self) -> tuple[Tensor | None, Tensor | None]:
        rows = self._arrived()
        parts = (rows, rows) if self.layout is None else unpack(rows, self.layout)[:2]
        x_grad, weights_grad = (
            sum_copies(part, self.plan.rows) if needed else None for part, needed in zip(parts, self.needs, strict=True)
        )
        return x_grad, weights_grad

    def _arrived(self) -> Tensor:
        assert self.under_way is not None
        under_way, self.under_way = self.under_way, None
        return under_way.arrived()


class _Combine(torch.autograd.Function):
    """Rows back to where they came from, and their sum by token: [R,H] to [N,H]; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, group: Any, scale: float, keep: Any) -> Tensor:
        ctx.plan, ctx.group, ctx.scale, ctx.keep = plan, group, scale, keep
        y_s = _exchange(y, plan.receive_counts, plan.send_counts, group)
        return sum_copies(y_s, plan.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        rows = gather(scaled(gradients[0], ctx.scale), plan.rows)
        return _exchange(rows, plan.send_counts, plan.receive_counts, ctx.group), None, None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def _start(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Exchange:
    """Send rows [S,C] by NCCL's stream, while the current one goes on."""
    rows, received = rows.contiguous(), rows.new_empty(sum(receive), rows.shape[1])
    return Exchange(dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True), received, rows)
