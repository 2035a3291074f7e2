"""What is recorded for calls of one size, and for calls with any number of tokens up to a capacity.

A ragged batch without its padding has another number of tokens in every step, and sequences of other lengths. A block
computes each token by itself, and attention sees nothing of what comes after a sequence. So they may be recorded for
the most tokens that come, and played for fewer: they come first, behind them are zeros, which choose no expert
(`experts.known_sizes`), are sequences of their own (`Slots`), and whose gradients are zero.

Sizes: [B,T] tokens of a call, N of them, C the capacity.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moe_accel.graphs.calls import Given, Unusual, with_tensors, without_sizes
from moe_accel.padding.rows import Rows, Slots

RAGGED = 10
"""Calls with other numbers of tokens, one after the other, from the most of which a capacity is chosen."""
AGAIN = 2
"""Of these, for which there are as many calls where something was recorded before."""
ONE_IN, TOO_MANY = 200, 5
"""Calls with more tokens than there is room for: one in so many may be; after so many more, more room is made."""
MOST_TOKENS = 4096
"""Of a rank, where their number changes: what is recorded computes those that are only room for more, too."""
MOST_ALIKE, MOST_ROWS = 8192, 32_768
"""Of a rank, and of all ranks, in blocks with experts where it does not change. Qwen3-30B-A3B's shapes, 8192 tokens a
rank: 12 layers on two H100 199.7 ms a step where it took 213.1 with attention's graphs alone; 24 on four 364.8 where it
took 381.3, with a balanced router 344.6 and 342.2 (2026-11-27). More were not measured: the GPU, which computes more in
what is recorded, waits less for the host, and with more ranks all-gather sends more than all-to-all."""
STEP = 128
"""Capacities for numbers of tokens that change, and for lengths of sequences, are multiples of it."""


class Extent(NamedTuple):
    """How large a call is, or may be.

    Attributes:
        tokens: of all sequences.
        sequences: in one row, where attention is among the tokens of each; else 0.
        longest: tokens of the longest of these.
        fewest: tokens of a call that may be so large, at least.
    """

    tokens: int = 0
    sequences: int = 0
    longest: int = 0
    fewest: int = 0

    def has_room_for(self, other: "Extent") -> bool:
        """Whether a call may be as large as another."""
        pairs = zip(self[:3], other[:3], strict=True)
        return self.fewest <= other.tokens and all(most >= one for most, one in pairs)


class AsGiven:
    """Sizes of one kind of call.

    Attributes:
        behind: see `Capacity`; None: no token is only room for more.
    """

    behind: Tensor | None = None

    def kind_of(self, found: Given) -> Any:
        """What calls have in common that may be played."""
        return found.kind

    def room_for(self, found: Given) -> tuple[list[Tensor], Any]:
        """Copies of a call's tensors, to record with, and the call with these in their places."""
        inputs = copies_to_differentiate(found.tensors)
        return inputs, with_tensors(found.structure, iter(inputs))

    def takes(self, kind: Any, found: Given) -> bool:
        """Whether a call may be played by what is recorded for a `kind`."""
        return self.kind_of(found) == kind

    def holds(self, found: Given) -> bool:
        """Whether recorded tensors that say how large a call is say it of this one."""
        return True

    def begin(self, found: Given) -> None:
        """This call is played now."""

    def check(self, made: Any) -> None:
        """Raise Unusual where something that was recorded as output cannot be `cut`."""

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Put a call's tensors, or gradients of its outputs, where the graph reads them."""
        copy(targets, sources)

    def cut(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of recorded outputs, or gradients of inputs, those of the call that was played."""
        return list(tensors)


class Capacity(AsGiven):
    """Room for C tokens, shared by what is recorded of all layers.

    Attributes:
        most: what there is room for; C tokens.
        behind: [C,1] bool on the device, read by what is recorded: True behind the N tokens of the call.
    """

    def __init__(self, most: Extent, device_type: str):
        self.most = most
        self.behind = torch.zeros(most.tokens, 1, dtype=torch.bool, device=device_type)
        self._slots = Slots(*most[:3], device_type) if most.sequences else None
        self._lead, self._rows = torch.Size((1, most.tokens)), None

    def kind_of(self, found: Given) -> Any:
        """See `AsGiven.kind_of`; None where not all tensors are [B,T,...]."""
        return by_token(found)

    def room_for(self, found: Given) -> tuple[list[Tensor], Any]:
        """[1,C,...] of each [B,T,...], filled with the call's tokens."""
        room = [each.new_zeros(1, self.most.tokens, *each.shape[2:]) for each in found.tensors]
        self.begin(found)
        self.fill(room, [each.detach() for each in found.tensors])
        for one, each in zip(room, found.tensors, strict=True):
            one.requires_grad_(each.requires_grad)
        return room, with_tensors(found.structure, iter(room), self._slots)

    def takes(self, kind: Any, found: Given) -> bool:
        """See `AsGiven.takes`."""
        return self.most.has_room_for(extent_of(found)) and super().takes(kind, found)

    def holds(self, found: Given) -> bool:
        """See `AsGiven.holds`."""
        return found.tensors[0].shape[:2] == self._lead and _rows_of(found) is self._rows

    def begin(self, found: Given) -> None:
        """See `AsGiven.begin`: the device is told where it is another call than before."""
        before, self._lead = self._lead.numel(), found.tensors[0].shape[:2]
        count, behind = self._lead.numel(), cast(Tensor, self.behind)
        if count != before:
            behind[:count] = False
            behind[count:] = True
        rows, held = _rows_of(found), self._rows
        if self._slots is not None and rows is not None and rows is not held:
            self._slots.hold(rows)
        self._rows = rows

    def check(self, made: Any) -> None:
        """See `AsGiven.check`."""
        if type(made) in (tuple, list):
            for each in made:
                self.check(each)
        elif made is not None and not (isinstance(made, Tensor) and self._is_by_token(made)):
            raise Unusual("an output that is not one of each token")

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """[B,T,...] to [1,C,...], or [N,...] to [C,...], zeros behind: two kernels for each dtype."""
        count, rows = self._lead.numel(), list(map(self._as_rows, targets))
        copy([each[:count].view_as(source) for each, source in zip(rows, sources, strict=True)], sources)
        if rows and count < self.most.tokens:
            torch._foreach_zero_([each[count:] for each in rows])  # pyright: ignore[reportPrivateImportUsage]

    def cut(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """[1,C,...] to [B,T,...], and [C,...] to [N,...]: views."""
        count = self._lead.numel()
        found = []
        for each in tensors:
            if each is not None:
                rows = self._as_rows(each)[:count]
                each = rows if len(each) == self.most.tokens else rows.view(*self._lead, *rows.shape[1:])
            found.append(each)
        return found

    def _is_by_token(self, tensor: Tensor) -> bool:
        return tensor.shape[:1] == (self.most.tokens,) or tensor.shape[:2] == (1, self.most.tokens)

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == self.most.tokens else tensor[0]


class OneRow(Capacity):
    """The same for attention, to which rows may not be put one after the other; of packed ones there is one."""

    def kind_of(self, found: Given) -> Any:
        """See `AsGiven.kind_of`; None where there are several rows, too."""
        return by_token_of_one_row(found)


AS_GIVEN = AsGiven()


class Seen:
    """What was seen of calls that are alike but for their tokens.

    Attributes:
        calls: so many came one after the other.
        most: of each in them.
    """

    def __init__(self) -> None:
        self.calls, self.most = 0, Extent()
        self._fewest = self._missed = 0
        # Of calls with always as many tokens, one after the other: how many, and the most of each in them.
        self._constant, self._most_of_constant = 0, Extent()

    def forget(self) -> None:
        """All of it."""
        self.__init__()

    def note(self, extents: Sequence[Extent], limit: int, constant: bool = False) -> bool:
        """One more, of `extents`, on all ranks that must agree; whether it is one of those that there may be room for.

        Args:
            extents: on each rank.
            limit: of tokens.
            constant: whether there may be more, if they are always as many.
        """
        most, fewest = Extent(*map(max, *extents, Extent())), min(each.tokens for each in extents)
        goes_on = fewest == most.tokens == self._most_of_constant.tokens
        self._constant = self._constant + 1 if goes_on else int(fewest == most.tokens)
        self._most_of_constant = Extent(*map(max, most, self._most_of_constant)) if goes_on else most
        is_above = most.tokens > limit
        if fewest < 1 or (is_above and not (constant and self._constant > RAGGED)):
            return False
        if is_above:
            self.calls, self.most, self._fewest = self._constant, self._most_of_constant, fewest
            return True
        if self.most.tokens > limit:
            self.calls, self.most = 0, Extent()
        self._fewest = min(fewest, self._fewest) if self.calls else fewest
        self.calls, self.most = self.calls + 1, Extent(*map(max, self.most, most))
        return True

    @property
    def is_constant(self) -> bool:
        """Whether the last one had as many tokens as the one before."""
        return self._constant > 1

    @property
    def are_enough(self) -> bool:
        """Whether that is enough to choose a capacity."""
        return self.calls > RAGGED

    def capacity(self, eighths: int = 0) -> Extent:
        """For all that was seen, `eighths` of tokens more, and more and longer sequences, which cost next to nothing
        where they do not come.

        Where there were always as many tokens, it is for so many alone: nobody has tried it with fewer.
        """
        tokens, sequences, longest, _ = self.most
        fewest = tokens if tokens == self._fewest else 0
        if not fewest:
            tokens = min(_whole_steps(tokens + tokens * eighths // 8), max(tokens, MOST_TOKENS))
        return Extent(tokens, 2 * sequences, min(_whole_steps(longest + longest // 4), tokens), fewest)

    def misses(self) -> bool:
        """What is recorded has no room for this one: whether that is so too often."""
        self._missed += ONE_IN
        return self._missed > ONE_IN * TOO_MANY

    @property
    def has_missed(self) -> bool:
        """Whether there is something that `fits` makes good."""
        return self._missed > 0

    def fits(self, as_much: bool = False) -> None:
        """It has room; `as_much`: which it would not have in a capacity, so that it counts as much as another miss."""
        self._missed = max(0, self._missed - (ONE_IN if as_much else 1))

    def begin_again(self) -> None:
        """What was recorded is not any more."""
        self.calls, self._missed = min(self.calls, RAGGED - AGAIN), 0


def most_alike(num_ranks: int) -> int:
    """Tokens of a rank for which blocks with experts are recorded, if all ranks always have as many."""
    return min(MOST_ALIKE, MOST_ROWS // num_ranks)


def _whole_steps(count: int) -> int:
    return -(-count // STEP) * STEP


def by_token(found: Given) -> Any:
    """The kind of a call but for how many tokens it has; None where its tensors are not all [B,T,...]."""
    lead = found.tensors[0].shape[:-1] if found.tensors else ()
    if len(lead) != 2 or any(each.shape[:2] != lead for each in found.tensors):
        return None
    if any(each.rows is not found.masks[0].rows for each in found.masks):
        return None
    structure, *rest = found.kind
    of_tensors = [(each.shape[2:], each.dtype, each.requires_grad) for each in found.tensors]
    return without_sizes(structure), of_tensors, *rest


def by_token_of_one_row(found: Given) -> Any:
    """The same; None where there are several rows, too."""
    return by_token(found) if found.tensors and len(found.tensors[0]) == 1 else None


def extent_of(found: Given | None) -> Extent:
    """Of a call; -1 tokens where it cannot be recorded."""
    if found is None:
        return Extent(-1)
    rows = _rows_of(found)
    tokens = sum(each.shape[:-1].numel() for each in found.tensors[:1])
    return Extent(tokens) if rows is None else Extent(tokens, len(rows.lengths), rows.longest)


def _rows_of(found: Given) -> Rows | None:
    rows = found.masks[0].rows if found.masks else None
    return rows if isinstance(rows, Rows) else None


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Of tensors of the same shapes: one kernel for each dtype."""
    for dtype in {each.dtype for each in targets}:
        pairs = [(one, other) for one, other in zip(targets, sources, strict=True) if one.dtype == dtype]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [one for one, _ in pairs], [other for _, other in pairs]
        )


def copies_to_differentiate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the values of these, that want gradients as they do."""
    return [each.detach().clone().requires_grad_(each.requires_grad) for each in tensors]
