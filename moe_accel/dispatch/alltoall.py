"""The transport that needs nothing: `all_to_all_single` of torch.distributed, on NCCL, gloo or any other backend.

A token goes once to each rank that holds any of its experts, however many of them: with 128 experts on 8 ranks and
K = 8 that is 5.3 rows a token instead of 8 (8 * (1 - (7/8)^8), for uniform routing). One copy from the device to the
host a layer, for the row counts that torch wants as python numbers; none when a handle is given. The counts are on
their way as soon as there are choices, and where rows go is worked out meanwhile, without them.

Sizes: N tokens of this rank, S rows sent, R rows received, G ranks, H hidden, K top-k, e experts of each rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch.halves import travel
from moe_accel.kernels.rows import RowMap, gather_rows, sum_rows


@dataclass(frozen=True)
class AllToAllHandle:
    """Where the rows of one dispatch went and came from.

    Attributes:
        choices: [R,K] int32, local expert of each choice of a received row, -1 where another rank has it.
        num_pairs: how many of `choices` are not -1.
        rows: the S sent copies of this rank's N tokens, ordered by receiving rank, then by token.
        send_counts: rows sent to each rank.
        receive_counts: rows received from each rank.
    """

    choices: Tensor
    num_pairs: int
    rows: RowMap
    send_counts: list[int]
    receive_counts: list[int]


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
    ) -> tuple[Tensor, Tensor, Tensor, AllToAllHandle]:
        """See `Dispatcher.dispatch`."""
        arriving = None
        if handle is None:
            handle, arriving = self._plan(choices)
        x_s = gather_rows(x, handle.rows)
        # A weight goes along to every rank its token goes to; only the rank that has the expert gives it a gradient.
        weights_s = gather_rows(weights, handle.rows)
        x_r, weights_r = travel(x_s, weights_s, _Transfer(handle, self.group), beside)
        if arriving is not None:
            _finish(*arriving)
        return x_r, handle.choices, weights_r, handle

    def combine(self, y: Tensor, handle: AllToAllHandle) -> Tensor:
        """See `Dispatcher.combine`."""
        y_s: Any = _Exchange.apply(y, handle.receive_counts, handle.send_counts, self.group)
        return sum_rows(y_s, handle.rows)

    @torch.no_grad()
    def _plan(self, choices: Tensor) -> tuple[AllToAllHandle, tuple[Any, Tensor, Tensor]]:
        """The handle, and its choices on their way."""
        num_tokens = choices.shape[0]
        device, num_ranks = choices.device, self.num_ranks
        ranks_nk = torch.div(choices, self.num_local_experts, rounding_mode="floor")
        pairs_gn = torch.zeros(num_ranks, num_tokens, dtype=torch.int32, device=device)
        pairs_gn.scatter_add_(0, ranks_nk.t().contiguous(), torch.ones_like(ranks_nk.t(), dtype=torch.int32))
        goes_gn = pairs_gn > 0

        sent = torch.stack([goes_gn.sum(1), pairs_gn.sum(1)], dim=1)  # [G,2] rows and pairs
        received = torch.empty_like(sent)
        counting: Any = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        rows, rank_of_row = _sent_rows(goes_gn, num_tokens * min(num_ranks, choices.shape[1]))
        counting.wait()
        counts = torch.cat([sent, received], dim=1).tolist()  # the one wait for the device
        send_counts, receive_counts = [row[0] for row in counts], [row[2] for row in counts]

        num_rows = sum(send_counts)
        rows = RowMap(rows.sources[:num_rows], rows.copies[:num_rows], rows.starts)
        rank_of_row = rank_of_row[:num_rows]
        local_sk = choices.index_select(0, rows.sources) - (rank_of_row * self.num_local_experts)[:, None]
        here = (local_sk >= 0) & (local_sk < self.num_local_experts)
        local_sk = local_sk.where(here, -1).to(torch.int32)
        arriving = _start(local_sk, send_counts, receive_counts, self.group)
        num_pairs = sum(row[3] for row in counts)
        return AllToAllHandle(arriving[1], num_pairs, rows, send_counts, receive_counts), arriving


def _sent_rows(goes_gn: Tensor, most: int) -> tuple[RowMap, Tensor]:
    """The sent copies, ordered by rank then token, and each one's rank [S]; without any wait for the device.

    Args:
        goes_gn: [G,N], whether a token goes to a rank.
        most: how many copies there can be; the places behind those that there are hold nothing of worth.
    """
    num_ranks, num_tokens = goes_gn.shape
    device = goes_gn.device
    by_rank = goes_gn.reshape(-1)
    place = (by_rank.cumsum(0) - 1).where(by_rank, most)  # all that is not sent shares one slot past the end
    positions = torch.arange(by_rank.numel(), device=device)
    sent = positions.new_zeros(most + 1).scatter_(0, place, positions)

    by_token = goes_gn.t().reshape(-1)
    slots = (by_token.cumsum(0) - 1).where(by_token, most)
    place_by_token = place.view(num_ranks, num_tokens).t().reshape(-1)
    copies = place.new_zeros(most + 1).scatter_(0, slots, place_by_token)
    per_token = goes_gn.sum(0)
    width = max(num_tokens, 1)
    return RowMap(sent % width, copies, per_token.cumsum(0) - per_token), sent // width


class _Transfer:
    """Rows and their routing weights on the way; see `halves.Transfer`.

    Until the current stream waits for an exchange, both its sides are kept alive here.
    """

    needs: tuple[bool, bool] = False, False

    def __init__(self, handle: AllToAllHandle, group: Any):
        self.handle, self.group = handle, group
        self.under_way: list[tuple[Any, Tensor, Tensor] | None] = []

    def launch(self, x: Tensor, weights: Tensor) -> None:
        sizes = self.handle.send_counts, self.handle.receive_counts
        self.under_way = [_start(rows, *sizes, self.group) for rows in (x, weights)]

    def arrive(self) -> Any:
        under_way, self.under_way = self.under_way, []
        return tuple(None if each is None else _finish(*each) for each in under_way)

    def launch_back(self, x_grad: Tensor, weights_grad: Tensor) -> None:
        sizes = self.handle.receive_counts, self.handle.send_counts
        both = zip((x_grad, weights_grad), self.needs, strict=True)
        self.under_way = [_start(rows, *sizes, self.group) if needed else None for rows, needed in both]

    def arrive_back(self) -> Any:
        return self.arrive()


class _Exchange(torch.autograd.Function):
    """Rows to the ranks they are meant for; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def _start(rows: Tensor, send: list[int], receive: list[int], group: Any) -> tuple[Any, Tensor, Tensor]:
    """Send rows [S,C] by NCCL's stream, while the current one goes on: what `_finish` wants."""
    rows, received = rows.contiguous(), rows.new_empty(sum(receive), rows.shape[1])
    return dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True), received, rows


def _finish(work: Any, received: Tensor, rows: Tensor) -> Tensor:
    """Let the current stream wait for the rows received."""
    work.wait()
    return received
