"""A dispatch in two halves of the autograd graph, so that something else is computed while rows travel, both ways.

    forward     launch      what is beside it      arrive      experts ...
    backward    arrive's: rows are sent back      the gradient of what was beside it      launch's: wait for them

Autograd takes the node made last first: the backward of what is computed between the halves runs between their
backwards. It has nothing to wait for by then, so it is on the device right after the rows were sent, on the stream that
computes, and they travel on the transport's own.

Between the halves there are no rows to hand on yet, in either direction: an empty tensor ties them together, and the
`Transfer` keeps what is under way, and alive, until it is waited for.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Transfer(Protocol):
    """One dispatch and its backward. `launch` waits for no row, `arrive` lets the current stream wait for them.

    Attributes:
        needs: whether x and weights get a gradient; set by `travel`.
    """

    needs: tuple[bool, bool]

    def launch(self, x: Tensor, weights: Tensor) -> None:
        """Send."""
        ...

    def arrive(self) -> tuple[Tensor, Tensor]:
        """x and weights as received."""
        ...

    def launch_back(self, x_grad: Tensor, weights_grad: Tensor) -> None:
        """Send the gradients of what was received the other way, those that `needs` asks for."""
        ...

    def arrive_back(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of what was sent."""
        ...


class Exchange:
    """Rows under way by the process group's own stream, both sides kept alive.

    Attributes:
        coming: where they go, and are not before they have arrived.
    """

    def __init__(self, work: Any, received: Tensor, sent: Tensor):
        self._work, self.coming, self._sent = work, received, sent

    def arrived(self) -> Tensor:
        """The rows received, for which the current stream waits."""
        self._work.wait()
        return self.coming


class Arrival:
    """Rows that are handed on while they are still under way, for whoever has something to compute without them first.

    Attributes:
        is_awaited: whether somebody has said that they will be waited for, so that they may be handed on.
    """

    def __init__(self, is_awaited: bool = False) -> None:
        self.is_awaited, self._exchange = is_awaited, None

    def expect(self, exchange: Exchange) -> None:
        """These are under way."""
        assert self._exchange is None
        self._exchange = exchange

    def wait(self) -> None:
        """Let the current stream wait for what is under way."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.arrived()


def handed_on(exchange: Exchange, arrival: Arrival | None) -> Tensor:
    """The rows received: under way where an `arrival` is awaited, else the current stream waits for them now."""
    if arrival is None or not arrival.is_awaited:
        return exchange.arrived()
    arrival.expect(exchange)
    return exchange.coming


def travel(
    x: Tensor, weights: Tensor, transfer: Transfer, beside: Callable[[], Any] | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x and weights as received by `transfer`; `beside` is called once, when they are under way.

    Differentiable once in x and weights, whose gradients are multiplied by `scale`, and in whatever `beside` computes.
    """
    launch: Any = _Launch.apply
    arrive: Any = _Arrive.apply
    tie = launch(x, weights, transfer, scale)
    if beside is not None:
        try:
            beside()
        except BaseException:  # the end of a recompute, too: nothing is to be written into memory that is free again
            transfer.arrive()
            raise
    return arrive(tie, transfer)


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, transfer: Transfer, scale: float) -> Tensor:
        ctx.transfer, ctx.scale = transfer, scale
        transfer.needs = ctx.needs_input_grad[:2]
        transfer.launch(x, weights)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_grad, weights_grad = (scaled(each, ctx.scale) for each in ctx.transfer.arrive_back())
        return x_grad, weights_grad, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tie: Tensor, transfer: Transfer) -> tuple[Tensor, Tensor]:
        ctx.transfer = transfer
        return transfer.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch_back(*gradients)
        return gradients[0].new_empty(0), None


def scaled(gradient: Any, scale: float) -> Any:
    """A gradient times a number, in its own dtype: exact where that is a power of two."""
    return gradient if gradient is None or scale == 1 else gradient * scale
