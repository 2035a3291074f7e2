"""Which layers the next forward keeps: `kept_layers: auto`, step by step. No torch; the same on every rank.

    warm       nothing kept: the optimizer makes its states at the end of this step
    base       nothing kept: the peak without kept layers, and what a checkpointed layer leaves behind
    probe      one layer kept, a step for each kind of layer: what it leaves behind now, and so costs
    planned    as many as the budget has room for at the tokens of each forward
    none       for good, where nothing fits or nothing could be measured

Every number that comes in is agreed between the ranks, so that they all keep the same layers: what a layer recomputes
has collectives in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_accel.kept.budget import Budget, Peak

SQUEEZE = 0.97
"""What the limit is multiplied by where the allocator gave back its cache in two steps one after the other: it is
fragmented, and has less room than it looks."""


@dataclass(frozen=True)
class Step:
    """A training step that has passed, by the rank where each number is worst; memory in bytes.

    Attributes:
        peak: the most allocated so far, this step's peak or one before it; infinite where that is not known.
        reached: the same where it was this step's; else 0.
        resident: allocated before the first forward.
        limit: what tensors may take.
        pressed: whether the allocator gave back its cache.
        passing: a token, of each kind of layer, what a checkpointed one leaves behind; 0 where none was looked at.
        holding: the same of a kept one.
    """

    peak: float
    reached: float
    resident: float
    limit: float
    pressed: bool
    passing: Sequence[float]
    holding: Sequence[float]


class Policy:
    """What to keep, from what was seen.

    Args:
        kinds: a number for each layer, the same for layers of the same make; the layer that is kept first first.
    """

    def __init__(self, kinds: Sequence[int]) -> None:
        self.kinds = tuple(kinds)
        self.examples = {kind: self.kinds.index(kind) for kind in sorted(set(kinds))}
        self.stage = "warm"
        self.why_none = ""
        self.budget: Budget | None = None
        self._base: Peak | None = None
        self._passing: dict[int, float] = {}
        self._costs: dict[int, float] = {}
        self._limit = 0.0
        self._was_pressed = False

    @property
    def is_measuring(self) -> bool:
        """Whether this step's peak must be its own, and what layers leave behind be looked at."""
        return self.stage in ("base", "probe")

    def choose(self, tokens: int) -> tuple[int, ...]:
        """The layers to keep in a step whose forwards have so many tokens, as positions in `kinds`."""
        if self.stage == "probe" and self._base is not None:
            grown = (self._base.peak - self._base.resident) * max(1.0, tokens / self._base.tokens)
            return (self.examples[self._probed()],) if self._base.resident + grown <= self._limit else ()
        return tuple(range(self.budget.most(tokens))) if self.budget is not None else ()

    def learn(self, step: Step, kept: int, tokens: int) -> bool:
        """Take up a step that kept `kept` layers, and go on to the next stage.

        Returns:
            Whether there is less room than there seemed to be.
        """
        if self.budget is not None:
            return self._correct(self.budget, step, Peak(kept, tokens, step.resident, step.peak))
        if step.peak == float("inf"):  # nobody knows what it took: the same again
            return False
        self._limit = step.limit
        if self.stage == "warm":
            self.stage = "base"
        elif self.stage == "base":
            self._base = Peak(0, tokens, step.resident, step.peak)
            self._passing = dict(zip(self.examples, step.passing, strict=True))
            self._go_on("probe", "a step without any leaves too little" if step.peak > step.limit else "")
        elif self.stage == "probe":
            self._measured(step)
        return False

    def _measured(self, step: Step) -> None:
        kind = self._probed()
        holding = dict(zip(self.examples, step.holding, strict=True))[kind]
        if not holding:  # the batch was too large to try
            return
        self._costs[kind] = max(0.0, holding - self._passing[kind])
        if len(self._costs) < len(self.examples):
            return
        self._go_on("planned", "" if any(self._costs.values()) else "what a layer holds can't be measured")
        if self.stage == "planned" and self._base is not None:
            self.budget = Budget([self._costs[kind] for kind in self.kinds], self._limit)
            self.budget.learn(self._base)

    def _correct(self, budget: Budget, step: Step, seen: Peak) -> bool:
        budget.limit = min(budget.limit, step.limit)
        squeezed = step.pressed and self._was_pressed
        self._was_pressed = step.pressed and not squeezed
        if squeezed:
            budget.limit = SQUEEZE * min(budget.limit, step.peak)
        return budget.learn(seen, step.reached) or squeezed

    def _probed(self) -> int:
        return next(kind for kind in self.examples if kind not in self._costs)

    def _go_on(self, stage: str, why_none: str) -> None:
        self.stage = "none" if why_none else stage
        self.why_none = why_none
