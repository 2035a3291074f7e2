"""Shared experts are computed while tokens travel, in expert parallelism.

A block of transformers computes its shared expert before its routed experts or after them, on one stream with them, so
that the device has nothing to do while tokens are on their way. Here the block's forward stays as it is, and the shared
expert, a module of it, is computed when the experts function says that the tokens have left:

    called after the experts      it is computed early, with what the router got; the block's call is given the result
                                  if it is with that very tensor, unchanged; else it computes
    called before the experts     the call returns an `Awaited`, a stand-in that is computed early or, at the latest,
                                  when somebody uses it

The whole call is made early or late, with its hooks, once. Backward follows by itself: autograd takes what was made
last first, and `dispatch/halves.py` sends gradients back before that of the shared expert is computed. It is beside
dispatch and not beside combine, though both move the same rows: the host waits for counts in dispatch; and recompute
under activation checkpointing ends before combine where nothing behind it keeps anything, as the shared expert would.

Which module of a block it is, is proven and not looked up: see `find_beside.py`.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class _State:
    """What the value of a call depends on, besides its input and the weights."""

    version: int
    grad: bool
    autocast: tuple[str, torch.dtype, bool] | None

    @classmethod
    def now(cls, x: Tensor) -> "_State":
        device = x.device.type
        autocast = None
        if torch.amp.is_autocast_available(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return cls(0 if x.is_inference() else x._version, torch.is_grad_enabled(), autocast)


@dataclass
class Slot:
    """Where a block, its shared expert and its experts meet, one forward at a time. It knows none of them.

    Attributes:
        name: of the shared expert in its block.
        late: whether the block calls it after the experts.
        is_open: whether the block's forward is running, and the shared expert's call may be moved.
        seen: late: what the router got.
        made: late: input, state and output of what was computed early.
        taken: late: whether the block's call was given the result, in the last forward.
        awaited: not late: what the call gave.
    """

    name: str
    late: bool
    is_open: bool = False
    seen: Tensor | None = None
    made: tuple[Tensor, _State, Any] | None = None
    taken: bool = False
    awaited: "Awaited | None" = None

    def close(self) -> None:
        """Forget this forward."""
        self.is_open, self.seen, self.made, self.awaited = False, None, None, None

    def __deepcopy__(self, memo: dict) -> "Slot":
        copied = memo[id(self)] = Slot(self.name, self.late)
        return copied

    def __reduce__(self) -> tuple:
        return Slot, (self.name, self.late)


@dataclass(frozen=True)
class Beside:
    """What an experts module is to have computed while tokens travel."""

    slot: Slot
    shared: Any

    def __deepcopy__(self, memo: dict) -> "Beside":
        return Beside(copy.deepcopy(self.slot, memo), copy.deepcopy(self.shared, memo))

    def work(self) -> Callable[[], Any] | None:
        """The function that does it, for this forward of the block; None where there is nothing to do."""
        slot = self.slot
        if not slot.is_open:
            return None
        if slot.late:
            return None if slot.seen is None else self._make
        slot.is_open, awaited, slot.awaited = False, slot.awaited, None
        return None if awaited is None else awaited.value

    def _make(self) -> None:
        x, self.slot.seen = self.slot.seen, None
        if x is not None:
            self.slot.made = x, _State.now(x), self.shared.compute_now(x)


class BlockBeside(nn.Module):
    """What a block does besides."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Its own forward, in which the shared expert's call may be moved."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        slot: Slot = self._moe_accel_slot
        # Not where something was put around it since: a checkpoint wrapper must see what is computed in it.
        slot.is_open, slot.taken = isinstance(self._modules.get(slot.name), SharedBeside), False
        try:
            return super().forward(*args, **kwargs)
        finally:  # recompute ends by an exception
            slot.close()


class SharedBeside(nn.Module):
    """What a shared expert does when it is called."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The result if it is there, a stand-in if it is to come; else as ever."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        slot: Slot = self._moe_accel_slot
        if not slot.is_open or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return super().__call__(*args, **kwargs)
        if not slot.late:
            if slot.awaited is not None:
                return super().__call__(*args)
            slot.awaited = Awaited(self, args[0])
            return slot.awaited
        made, slot.made = slot.made, None
        if made is None or made[0] is not args[0] or made[1] != _State.now(args[0]):
            return super().__call__(*args)
        slot.taken = True
        return made[2]

    def compute_now(self, x: Tensor) -> Any:
        """The call as it is without us, hooks and all."""
        return super().__call__(x)


class Awaited(Tensor):
    """The output of a shared expert that is computed while tokens travel, or as soon as anybody uses it."""

    _call: tuple[Any, Tensor, _State] | None
    _value: Any

    @staticmethod
    def __new__(cls, shared: Any, x: Tensor) -> "Awaited":  # noqa: D102
        made = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)  # pyright: ignore
        made._call, made._value = (shared, x, _State.now(x)), None
        return made

    def __init__(self, shared: Any, x: Tensor) -> None:
        super().__init__()

    @property
    def is_computed(self) -> bool:
        """Whether it has a value by now."""
        return self._call is None

    def value(self) -> Any:
        """The output itself, computed the first time.

        Raises:
            RuntimeError: the input was changed in place since the call.
        """
        if self._call is not None:
            shared, x, state = self._call
            if state.version != _State.now(x).version:
                raise RuntimeError(
                    f"the input of {type(shared).__name__} was changed in place before its output was used"
                )
            device, dtype, enabled = state.autocast or (None, None, None)
            autocast = torch.autocast(device, dtype, bool(enabled)) if device else nullcontext()
            with torch.set_grad_enabled(state.grad), autocast:
                self._value = shared.compute_now(x)
            self._call = None
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Awaited, Awaited.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only code that goes past torch's own functions comes here; nobody could differentiate it."""
        raise RuntimeError(f"{func} was called with the output of a shared expert that is not computed yet")


def see(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the module, the router, whose input is that of a shared expert that is called later."""
    if not torch.compiler.is_compiling():
        slot: Slot = module._moe_accel_slot
        if slot.is_open and slot.late:
            slot.seen = args[0] if args and isinstance(args[0], Tensor) else None
