"""What is recorded for calls of one size, and for calls with any number of tokens up to a capacity.

A ragged batch without its padding has another number of tokens in every step, and on every rank. A block computes each
token by itself; so it may be recorded for the most tokens that come, and played for fewer: they come first, behind them
are zeros, which choose no expert (`experts.known_sizes`) and whose gradients are zero.

Sizes: [B,T] tokens of a call, N of them, C the capacity.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_accel.graphs.calls import Given, Unusual

STEP = 128
"""Capacities are multiples of it."""


class AsGiven:
    """Sizes of one kind of call."""

    def kind_of(self, found: Given) -> Any:
        """What calls have in common that may be played."""
        return found.kind

    def room_for(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of a call's tensors, to record with."""
        return copies_to_differentiate(tensors, tensors)

    def takes(self, kind: Any, found: Given) -> bool:
        """Whether a call may be played by what is recorded for a `kind`."""
        return self.kind_of(found) == kind

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """A call with these is played now."""

    def check(self, made: Any) -> None:
        """Raise Unusual where something that was recorded as output cannot be `cut`."""

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Put a call's tensors, or gradients of its outputs, where the graph reads them."""
        copy(targets, sources)

    def cut(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of recorded outputs, or gradients of inputs, those of the call that was played."""
        return list(tensors)


class Capacity(AsGiven):
    """Room for C tokens, shared by all blocks of a model.

    Attributes:
        most: C.
        behind: [C,1] bool on the device, read by what is recorded: True behind the N tokens of the call.
    """

    def __init__(self, most: int, device_type: str):
        self.most = -(-most // STEP) * STEP
        self.behind = torch.zeros(self.most, 1, dtype=torch.bool, device=device_type)
        self._lead, self._held = torch.Size((1, self.most)), self.most

    def kind_of(self, found: Given) -> Any:
        """See `AsGiven.kind_of`; None where not all tensors are [B,T,...]."""
        return by_token(found)

    def room_for(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[1,C,...] of each [B,T,...], filled with the call's tokens."""
        room = [each.new_zeros(1, self.most, *each.shape[2:]) for each in tensors]
        self.begin(tensors)
        self.fill(room, [each.detach() for each in tensors])
        return [one.requires_grad_(each.requires_grad) for one, each in zip(room, tensors, strict=True)]

    def takes(self, kind: Any, found: Given) -> bool:
        """See `AsGiven.takes`."""
        return super().takes(kind, found) and num_tokens(found) <= self.most

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """See `AsGiven.begin`: N is told to the device where it is another one than before."""
        self._lead = tensors[0].shape[:2]
        count = self._lead.numel()
        if count != self._held:
            self.behind[:count] = False
            self.behind[count:] = True
            self._held = count

    def check(self, made: Any) -> None:
        """See `AsGiven.check`."""
        if type(made) in (tuple, list):
            for each in made:
                self.check(each)
        elif made is not None and not (isinstance(made, Tensor) and self._is_by_token(made)):
            raise Unusual("an output that is not one of each token")

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """[B,T,...] to [1,C,...], or [N,...] to [C,...], zeros behind."""
        for target, source in zip(targets, sources, strict=True):
            rows, count = self._rows(target), self._lead.numel()
            rows[:count].view_as(source).copy_(source)
            if count < self.most:
                rows[count:].zero_()

    def cut(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """[1,C,...] to [B,T,...], and [C,...] to [N,...]: views."""
        count = self._lead.numel()
        found = []
        for each in tensors:
            if each is not None:
                rows = self._rows(each)[:count]
                each = rows if len(each) == self.most else rows.view(*self._lead, *rows.shape[1:])
            found.append(each)
        return found

    def _is_by_token(self, tensor: Tensor) -> bool:
        return tensor.shape[:1] == (self.most,) or tensor.shape[:2] == (1, self.most)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == self.most else tensor[0]


AS_GIVEN = AsGiven()


def by_token(found: Given) -> tuple | None:
    """The kind of a call but for how many tokens it has; None where its tensors are not all [B,T,...]."""
    lead = found.tensors[0].shape[:-1] if found.tensors else ()
    if len(lead) != 2 or any(each.ndim < 3 or each.shape[:2] != lead for each in found.tensors):
        return None
    structure, *rest = found.kind
    of_tensors = [(each.shape[2:], each.dtype, each.requires_grad) for each in found.tensors]
    return _without_tensors(structure), of_tensors, *rest


def _without_tensors(kind: object) -> object:
    """What `calls.kind_of` says, without what it says of tensors."""
    if type(kind) is not tuple or not kind:
        return kind
    return "tensor" if isinstance(kind[0], torch.Size) else tuple(map(_without_tensors, kind))


def num_tokens(found: Given | None) -> int:
    """Of a block's call; -1 where it cannot be recorded."""
    return -1 if found is None else sum(each.shape[:-1].numel() for each in found.tensors[:1])


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Of tensors of the same shapes: one kernel for each dtype."""
    for dtype in {each.dtype for each in targets}:
        pairs = [(one, other) for one, other in zip(targets, sources, strict=True) if one.dtype == dtype]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [one for one, _ in pairs], [other for _, other in pairs]
        )


def copies_to_differentiate(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the values of `tensors`, that want gradients as those of `like` do."""
    return [each.detach().clone().requires_grad_(one.requires_grad) for each, one in zip(tensors, like, strict=True)]
