"""Router logits, which transformers takes out of a forward by hooks on routers, for an auxiliary loss.

A hook appends to a list of the forward that goes on, if that was asked for them. What is recorded has a list of its
own; what it holds is an output of the recorded call, and is appended where it is played.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

try:
    from transformers.utils.output_capturing import _active_collector as collector
except ImportError:  # a transformers that does it otherwise: such hooks are like any others
    collector: Any = None

KEY = "router_logits"


def is_of_router(hook: Any) -> bool:
    """Whether a forward hook is transformers' own that takes router logits, and nothing else."""
    if collector is None or getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return False
    held = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return "key" in held and held["key"].cell_contents == KEY


def is_asked_for() -> bool:
    """Whether router logits are taken from the forward that goes on."""
    return collector is not None and KEY in (collector.get() or ())


@contextmanager
def apart() -> Iterator[list[Tensor]]:
    """Router logits that are taken in this block, and nowhere else."""
    found: list[Tensor] = []
    if collector is None:
        yield found
        return
    before = collector.set({KEY: found} if is_asked_for() else None)
    try:
        yield found
    finally:
        collector.reset(before)


def hand_on(found: Sequence[Tensor]) -> None:
    """To whoever asked for them."""
    if found:
        collector.get()[KEY].extend(found)
