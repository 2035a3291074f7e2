"""The tokens of a batch that are computed, one sequence after the other.

Sizes: B batch, T its padded length, N tokens that are computed, S sequences among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label that transformers' losses ignore."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the N computed tokens stand in a batch [B,T].

    Attributes:
        batch: B.
        length: T.
        lengths: tokens of each of the S sequences, on the host.
        bounds: [S+1] int32, where each begins among the N tokens; the last is N.
        index: [N] int64, places of the tokens in the batch as one row [B*T]; None: all of them, N is B*T.
    """

    batch: int
    length: int
    lengths: tuple[int, ...]
    bounds: Tensor
    index: Tensor | None

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def are_alike(self) -> bool:
        """Whether all sequences are as long."""
        return len(set(self.lengths)) == 1

    def take(self, values: Tensor) -> Tensor:
        """[B,T,...] -> [1,N,...]."""
        flat = values.reshape(self.batch * self.length, *values.shape[2:])
        return (flat if self.index is None else flat[self.index]).unsqueeze(0)

    def put(self, values: Tensor) -> Tensor:
        """[N,...] -> [B*T,...], zeros where nothing was computed."""
        if self.index is None:
            return values
        return values.new_zeros(self.batch * self.length, *values.shape[1:]).index_copy(0, self.index, values)

    def put_batch(self, values: Tensor) -> Tensor:
        """[1,N,...] -> [B,T,...], zeros where nothing was computed."""
        return self.put(values[0]).view(self.batch, self.length, *values.shape[2:])

    def as_padded(self, value: Any) -> Any:
        """What a model puts out for [1,N] tokens, as it puts it out for [B,T]; what has no tokens in it stays."""
        if isinstance(value, tuple | list):
            return type(value)(map(self.as_padded, value))
        if hasattr(value, "padded"):  # logits that are not computed yet
            return value.padded(self)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.ndim > 1 and value.shape[:2] == (1, self.num_tokens):
            return self.put_batch(value)
        if value.ndim > 1 and value.shape[:2] == (1, self.num_tokens - 1):  # of each token but the last
            return self.put_batch(functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 1)))[:, :-1]
        if value.ndim > 1 and value.shape[0] == self.num_tokens:
            return self.put(value)
        return value


class Slots:
    """Room for sequences of other lengths every time, for what was recorded: they are read from one place.

    Behind the tokens there are pieces of nothing, up to those that there is room for; all slots behind are empty.

    Attributes:
        lengths: of what is in the slots now, on the host.
        bounds: [S+1] int32, where each begins; the last is as many tokens as there is room for.
        longest: tokens of the longest sequence that there is room for.
        are_alike: False.
    """

    PIECE = 256
    """Tokens that are nobody's, and see each other."""

    def __init__(self, num_tokens: int, num_sequences: int, longest: int, device: str):
        self._num_tokens, self.longest, self.are_alike = num_tokens, longest, False
        self._piece = min(self.PIECE, longest)
        num_slots = num_sequences + -(-num_tokens // self._piece)
        self.lengths: tuple[int, ...] = ()
        self.bounds = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self._steps = torch.arange(num_slots + 1, dtype=torch.int32, device=device) * self._piece

    def hold(self, rows: Rows) -> None:
        """Put these in, by the device alone."""
        count, behind = len(rows.lengths), len(self.bounds) - 1 - len(rows.lengths)
        num_tokens = rows.num_tokens
        self.bounds[: count + 1] = rows.bounds
        torch.clamp(self._steps[1 : behind + 1] + num_tokens, max=self._num_tokens, out=self.bounds[count + 1 :])
        ends = [min(num_tokens + at * self._piece, self._num_tokens) for at in range(behind + 1)]
        self.lengths = *rows.lengths, *(end - start for start, end in pairwise(ends))


def of_batch(batch: int, length: int, device: torch.device) -> Rows:
    """All tokens of a batch [B,T], each row one sequence."""
    bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    return Rows(batch, length, (length,) * batch, bounds, None)


@dataclass(frozen=True)
class Found:
    """What there is to know of a padded batch before it is computed without padding.

    Attributes:
        rows: its tokens; None where none is padding, or all are.
        left: whether padding comes first in a row.
        why_not: what makes the padded batch compute something else; None: nothing does.
        is_whole: whether none is padding.
    """

    rows: Rows | None
    left: bool = False
    why_not: str | None = None
    is_whole: bool = False


def of_mask(mask: Tensor, labels: Tensor) -> Found:
    """The tokens of a batch that its mask does not call padding; waits for the device once.

    Args:
        mask: [B,T], 0 for padding.
        labels: [B,T] int64.
    """
    real = mask != 0
    batch, length = real.shape
    before = functional.pad(real[:, :-1], (1, 0))
    runs = (real & ~before).sum(1)
    aimed_at = (labels[:, 1:] != IGNORED) & ~(real[:, 1:] & before[:, 1:])
    late = (runs > 0) & ~real[:, 0]
    told = torch.stack((aimed_at.any(), (runs > 1).any(), late.any())).long()
    sizes = real.sum(1)
    has_labels, has_holes, left, *lengths = torch.cat((told, sizes)).tolist()
    num_tokens = sum(lengths)
    if num_tokens in (0, batch * length):
        return Found(None, is_whole=num_tokens > 0)
    if has_labels:
        return Found(None, bool(left), "labels of padding, or of a token behind padding, are not -100")
    if has_holes:
        return Found(None, bool(left), "padding inside a sequence")
    index = torch.sort(real.view(-1).byte(), descending=True, stable=True).indices[:num_tokens]
    bounds = functional.pad(sizes.cumsum(0), (1, 0)).int()
    return Found(Rows(batch, length, tuple(lengths), bounds, index), bool(left))


def of_positions(positions: Tensor) -> Rows | None:
    """The sequences of a packed batch, which begin where transformers sees them begin; waits for the device.

    Args:
        positions: [B,T] int64.

    Returns:
        All tokens of the batch; None where each row is one sequence.
    """
    batch, length = positions.shape
    begins = functional.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
    at: Sequence[int] = begins.view(-1).nonzero().view(-1).tolist()
    if len(at) == batch:
        return None
    bounds = [*at, batch * length]
    lengths = tuple(end - start for start, end in pairwise(bounds))
    return Rows(batch, length, lengths, torch.tensor(bounds, dtype=torch.int32).to(positions.device), None)
