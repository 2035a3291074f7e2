"""How many layers memory has room for: the arithmetic of `kept_layers: auto`. No torch, no ranks, no clock.

What is known is peaks: "a step with n layers kept and T tokens a forward took P bytes at its peak, of which R were
there before". Keeping another layer adds what it holds between forward and backward, at most, wherever in the step the
peak is; and what was there on top of R grows no faster than the tokens do. So each peak seen bounds all others:

    peak(n, T) <= R + f * ((P - R) * max(1, T / T_seen) + T * (cost of the layers that n has more))

The least of these bounds counts. f is 1, and is raised where a peak was higher than its bound (attention that grows
with the square of a sequence, ranks with more than their share of tokens): once, for all bounds, and for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Peak:
    """A step that was seen.

    Attributes:
        kept: layers kept.
        tokens: of its largest forward, or of all forwards that waited for their backward together.
        resident: bytes allocated before its first forward.
        peak: most bytes allocated at any time of it.
    """

    kept: int
    tokens: int
    resident: float
    peak: float


class Budget:
    """Bounds of the peaks to come.

    Args:
        costs: bytes a token that each layer holds when it is kept, the layer that is kept first first.
        limit: bytes that no peak should pass.
    """

    def __init__(self, costs: Sequence[float], limit: float) -> None:
        self.limit = limit
        self.factor = 1.0
        self._cost_of = [0.0, *accumulate(costs)]
        self._peaks: list[Peak] = []

    @property
    def num_layers(self) -> int:
        """How many layers could be kept."""
        return len(self._cost_of) - 1

    def bytes_of(self, kept: int, tokens: int) -> float:
        """What the first `kept` layers hold for backward."""
        return self._cost_of[kept] * tokens

    def bound(self, kept: int, tokens: int) -> float:
        """Bytes that a step does not pass at its peak; infinite before any was seen."""
        return min((self._bound(each, kept, tokens) for each in self._peaks), default=float("inf"))

    def _bound(self, seen: Peak, kept: int, tokens: int) -> float:
        more = max(0.0, self._cost_of[kept] - self._cost_of[seen.kept]) * tokens
        grown = (seen.peak - seen.resident) * max(1.0, tokens / seen.tokens)
        return seen.resident + self.factor * (grown + more)

    def most(self, tokens: int) -> int:
        """The largest number of layers whose peak stays within the limit; 0 where none does."""
        fitting = (kept for kept in range(self.num_layers, 0, -1) if self.bound(kept, tokens) <= self.limit)
        return next(fitting, 0)

    def learn(self, seen: Peak, at_least: float = 0.0) -> bool:
        """Take up a step; returns whether it passed its bound.

        Args:
            seen: the step; its peak may be one of an earlier step, since it did not pass that.
            at_least: bytes that this very step did reach, 0 where that is not known.
        """
        bound = self.bound(seen.kept, seen.tokens)
        surprised = at_least > bound > seen.resident
        if surprised:
            self.factor *= (at_least - seen.resident) / (bound - seen.resident)
        elif self._bound(seen, seen.kept, seen.tokens) < bound:  # tells something new
            self._peaks = [each for each in self._peaks if not _says_less(each, seen)] + [seen]
        return surprised


def _says_less(old: Peak, new: Peak) -> bool:
    return old.kept <= new.kept and old.tokens <= new.tokens and old.peak >= new.peak
