"""The transport whose sizes are known beforehand: all tokens to all ranks, by all-gather.

With few ranks and many choices almost every token goes to every rank anyway: with K = 8 to 4 ranks 90 % of what is sent
here, to 8 ranks 66 % (uniform routing). What it takes more of the link it saves the host: no counts, so nobody waits
for the device; no order of rows; and all of it may be recorded as a CUDA graph, which needs to know sizes. All ranks
must have the same number of tokens, and each must make the same calls.

    forward     x, weights and choices are gathered      rows summed over this rank's experts go home, are added there
    backward    gradients of sums are gathered           gradients of rows go home, are added there

What is needed later than it could be there is handed on under way (`halves.Arrival`): x, until its rows are sorted by
their choices, and gradients of sums, until the first projection is computed once more.

Sizes: N tokens of this rank, G ranks, R = G * N rows, H hidden, K top-k, e experts of each rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch.halves import Arrival, Exchange, handed_on, scaled, travel

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it


@dataclass(frozen=True)
class AllGatherHandle:
    """What a dispatch leaves.

    Attributes:
        choices: [R,K] int32, local expert of each choice of a row, -1 where another rank has it.
        num_pairs: None: how many of them are not -1 is not known on the host.
    """

    choices: Tensor
    num_pairs: None = None


class AllGather:
    """Dispatcher over the ranks of one process group, each holding `num_local_experts` consecutive experts."""

    name = "allgather"

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int):
        self.group, self.num_local_experts = group, num_local_experts
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def dispatch(
        self,
        x: Tensor,
        choices: Tensor,
        weights: Tensor,
        handle: AllGatherHandle | None = None,
        beside: Callable[[], Any] | None = None,
        scale: float = 1.0,
        arrival: Arrival | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, AllGatherHandle]:
        """See `Dispatcher.dispatch`. Where an `arrival` is awaited, x is under way until then."""
        transfer = _Transfer(self, choices, handle, arrival)
        x_r, weights_r = travel(x, weights, transfer, beside, scale)
        return x_r, transfer.handle.choices, weights_r, transfer.handle

    def combine(
        self,
        y: Tensor,
        handle: AllGatherHandle,
        scale: float = 1.0,
        keep: Any = None,
        arrival: Arrival | None = None,
    ) -> Tensor:
        """See `Dispatcher.combine`. Where an `arrival` is awaited, the gradient of y is under way until then."""
        combined: Any = _Combine.apply(y, self, scale, keep, arrival)
        return combined

    def local(self, choices: Tensor) -> Tensor:
        """Experts counted over all ranks -> those of this rank, -1 for all others, int32."""
        local = choices.int() - self.rank * self.num_local_experts
        return local.masked_fill((local < 0) | (local >= self.num_local_experts), -1)


class _Transfer:
    """Tokens with their routing weights and choices on the way, and the gradients of the first two on the way back; see
    `halves.Transfer`. Only the rank that has an expert gives its weight a gradient; all others give zero."""

    needs: tuple[bool, bool] = False, False

    def __init__(self, transport: AllGather, choices: Tensor, handle: AllGatherHandle | None, arrival: Arrival | None):
        self.transport, self.choices, self.known, self.arrival = transport, choices, handle, arrival
        self.under_way: list[Exchange | None] = []
        self.top_k, self.weights_dtype = choices.shape[1], torch.float32

    @property
    def handle(self) -> AllGatherHandle:
        """Of this dispatch, once it has arrived."""
        assert self.known is not None
        return self.known

    def launch(self, x: Tensor, weights: Tensor) -> None:
        self.weights_dtype = weights.dtype
        exact = torch.promote_types(weights.dtype, torch.float32)
        parts = [weights.to(exact)]
        if self.known is None:
            parts.append(self.choices.int().to(exact))  # as numbers: fp32 has all whole ones up to 2^24
        self.under_way = [_gathering(torch.cat(parts, 1), self.transport), _gathering(x, self.transport)]

    def arrive(self) -> tuple[Tensor, Tensor]:
        of_choices, of_x = self.under_way
        self.under_way = []
        assert of_choices is not None
        assert of_x is not None
        small = of_choices.arrived()
        if self.known is None:
            self.known = AllGatherHandle(self.transport.local(small[:, self.top_k :]))
        return handed_on(of_x, self.arrival), small[:, : self.top_k].to(self.weights_dtype)

    def launch_back(self, x_grad: Tensor, weights_grad: Tensor) -> None:
        both = zip((x_grad, weights_grad), self.needs, strict=True)
        self.under_way = [_going_home(each, self.transport) if needed else None for each, needed in both]

    def arrive_back(self) -> tuple[Tensor | None, Tensor | None]:
        num_ranks = self.transport.num_ranks
        x_grad, weights_grad = (each and _sum(each.arrived(), num_ranks) for each in self.under_way)
        self.under_way = []
        return x_grad, weights_grad


class _Combine(torch.autograd.Function):
    """Rows back to where they came from, and their sum by token: [R,H] to [N,H]; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, transport: AllGather, scale: float, keep: Any, arrival: Arrival | None) -> Tensor:
        ctx.transport, ctx.scale, ctx.keep, ctx.arrival = transport, scale, keep, arrival
        return _sum(_going_home(y, transport).arrived(), transport.num_ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange = _gathering(scaled(gradients[0], ctx.scale), ctx.transport)
        return handed_on(exchange, ctx.arrival), None, None, None, None


def _gathering(rows: Tensor, transport: AllGather) -> Exchange:
    """[N,C] on the way to all ranks: [R,C]."""
    rows = rows.contiguous()
    received = rows.new_empty(transport.num_ranks * len(rows), rows.shape[1])
    return Exchange(_all_gather(received, rows, group=transport.group, async_op=True), received, rows)


def _going_home(rows: Tensor, transport: AllGather) -> Exchange:
    """[R,C] on the way to where each came from: [R,C], N from each rank."""
    rows = rows.contiguous()
    received = torch.empty_like(rows)
    return Exchange(dist.all_to_all_single(received, rows, group=transport.group, async_op=True), received, rows)


def _sum(rows: Tensor, num_ranks: int) -> Tensor:
    """[R,C] -> [N,C], added in fp32 at least, in the order of ranks, and rounded once."""
    return rows.view(num_ranks, -1, rows.shape[1]).sum(0)
