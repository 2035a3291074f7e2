"""Gradients of large weights that are no part of a recorded backward: they are computed behind it, or beside its end,
into memory of their own, where a recording would hand out copies.

A backward under `collecting` does not compute them but says what they are made of; whoever plays it computes them while
that is there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A gradient that is to be computed.

    Attributes:
        matrices: what it is the gradient of, in the memory of a parameter.
        compute: of the operands, in the strides of `matrices`.
        operands: what backward made.
        may_be_beside: whether `compute` takes `out`, memory like `matrices`, and no other for anything as large: so it
            may be on a stream whose memory is not that of all else, beside what goes on.
        made: then, an event: backward has made the operands.
    """

    matrices: Tensor
    compute: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    may_be_beside: bool = False
    made: Any = None


class Products(list[Product]):
    """What a backward leaves to be computed.

    Attributes:
        mark: called where operands are made that may be computed with beside backward; gives an event.
    """

    def __init__(self, mark: Callable[[], Any] = lambda: None):
        super().__init__()
        self.mark = mark


_collected: ContextVar[Products | None] = ContextVar("collected", default=None)


@contextmanager
def collecting(products: Products | None) -> Iterator[None]:
    """A block whose backward, whenever it runs, puts such products into the list; None: computes them."""
    before = _collected.set(products)
    try:
        yield
    finally:
        _collected.reset(before)


def collected() -> Products | None:
    """The list of this block, for a forward to keep for its backward, which may run in another thread."""
    return _collected.get()


def gradient(
    products: Products | None,
    matrices: Tensor,
    compute: Callable[..., Tensor],
    *operands: Tensor,
    may_be_beside: bool = False,
) -> Tensor | None:
    """The gradient now, or None where it is to be computed later; see `Product`."""
    if products is None:
        return compute(*operands)
    made = products.mark() if may_be_beside else None
    products.append(Product(matrices, compute, operands, may_be_beside, made))
    return None
