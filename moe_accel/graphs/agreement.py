"""What all ranks do with the blocks that they record together, in one forward of the model: they agree on it.

At the first block of a forward each rank tells all others, through their hosts, what it knows (`State`); what follows
from all states is the same on every rank. A rank for itself decides nothing: it would exchange tokens with nobody.
"""

import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_accel.graphs.calls import Given
from moe_accel.graphs.module import CALLS, OTHER_CALLS
from moe_accel.graphs.recorder import Recorder
from moe_accel.ranks import group_of_hosts

WAITING = 100
"""Forwards without three alike on all ranks, after which they stop to ask each other."""
MOST_TOKENS = 4096
"""Of a rank. 12 layers of Qwen3-30B-A3B's shapes on two H200: with so many the host takes 110 of 130 ms a step, and 58
of 100 once blocks are recorded. More were not measured: the GPU, which computes more in recorded blocks, waits less."""


class Decision(Enum):
    """What all ranks do in one forward."""

    COMPUTE = "as ever"
    RECORD = "recorded, and computed as ever"
    PLAY = "played"
    TRY = "played, and computed as ever"


class State(NamedTuple):
    """Of one rank, at the first block of a forward, as numbers that all ranks are told.

    Attributes:
        num_tokens: that the first block was called with; -1 for a call that cannot be recorded.
        calls: so many came with as many, one after the other.
        has_ended: nothing is to be played any more.
        may_record: no forward that was played without a trial waits for its backward.
        recorded: whether something is.
        fits: and whether this call is of its kind.
        is_stale: and whether it is not as it was.
        is_busy: and whether the backward of an earlier forward may still come.
        is_due: and whether it is to be tried.
    """

    num_tokens: int
    calls: int
    has_ended: bool
    may_record: bool
    recorded: bool
    fits: bool
    is_stale: bool
    is_busy: bool
    is_due: bool


class Agreement:
    """Of the blocks of one model, and of all ranks.

    Attributes:
        why_ended: why all is computed as ever, for good: empty where it is for a rank to say; None: it is not.
        decision: of this forward.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.why_ended: str | None = None
        self.decision = Decision.COMPUTE
        self._group: Any = None
        # Blocks, which have this: in this forward, in the one before, and ever.
        self._called: list[weakref.ref[Any]] = []
        self._members: list[weakref.ref[Any]] = []
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kind: Any = None
        self._begins = True
        self._tokens = -1
        self._calls = self._other_calls = self._waited = 0

    def __deepcopy__(self, memo: dict) -> "Agreement":
        copied = memo[id(self)] = Agreement(memo.get(id(self.recorder)) or self.recorder.__deepcopy__(memo))
        return copied

    def __reduce__(self) -> tuple:
        return Agreement, (self.recorder,)

    def add(self, block: Any) -> None:
        """A block that is to be recorded."""
        self._all.add(block)

    def begin(self, *_: Any) -> None:
        """Forward pre-hook of the model."""
        self._begins = True

    def decide(self, block: Any, found: Given | None) -> Decision:
        """For one block's call: what was decided at the first of this forward. There it is a collective call."""
        # The first one again: somebody calls a part of the model, without its hook.
        if self._begins or self._called[0]() is block:
            self._members, self._called, self._begins = self._called, [], False
            self._tokens = _num_tokens(found)
            self.decision = self._decide(self._of_all_ranks(self._state(block, found)))
        elif any(each() is block for each in self._called):
            block.why_not = "called more than once in a forward"
        elif found is not None and _num_tokens(found) != self._tokens >= 0:
            block.why_not = "called with another number of tokens than the first block, which alone ranks compare"
        self._called.append(weakref.ref(block))
        return self.decision

    def _state(self, first: Any, found: Given | None) -> State:
        if found is None:
            self._calls = 0
        else:
            self._calls = self._calls + 1 if found.kind == self._kind else 1
            self._kind = found.kind
        members = [each for each in (each() for each in self._members) if each is not None]
        recorded = [each for each in members if each.recording is not None]
        own, recorder = first.recording, self.recorder
        is_busy = any(each.recording.is_pending for each in recorded)
        about_to_record = not recorded and self._calls > CALLS
        return State(
            num_tokens=self._tokens,
            calls=self._calls,
            has_ended=recorder.has_failed or any(each.has_ended(about_to_record) for each in self._all),
            may_record=recorder.may_record,
            recorded=bool(recorded),
            fits=own is not None and found is not None and own.kind == found.kind,
            is_stale=not all(each.is_as_recorded() for each in recorded),
            is_busy=is_busy or (own is not None and not recorder.may_play(own)),
            is_due=any(each.recording.trial.is_due for each in recorded),
        )

    def _of_all_ranks(self, state: State) -> list[State]:
        if self._group is None:
            self._group = group_of_hosts()
        own = torch.tensor([int(each) for each in state], device="cpu")
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own, group=self._group)
        return [State(*each.tolist()) for each in found]

    def _decide(self, ranks: Sequence[State]) -> Decision:
        """The same on all ranks, as it depends on nothing but what all were told, now and before."""
        tokens = [each.num_tokens for each in ranks]
        is_usual = min(tokens) == max(tokens) and 0 < max(tokens) <= MOST_TOKENS
        is_recorded = any(each.recorded for each in ranks)
        self._waited = 0 if is_recorded else self._waited + 1
        if any(each.has_ended for each in ranks):
            return self._end("")
        if self._waited > WAITING:
            return self._end(_why_unusual(tokens))
        if is_recorded:
            return self._of_recorded(ranks, is_usual)
        if not is_usual:
            self._calls = 0
            return Decision.COMPUTE
        are_alike = min(each.calls for each in ranks) > CALLS
        return Decision.RECORD if are_alike and all(each.may_record for each in ranks) else Decision.COMPUTE

    def _of_recorded(self, ranks: Sequence[State], is_usual: bool) -> Decision:
        fits = is_usual and all(each.fits and not each.is_busy for each in ranks)
        if not fits:
            self._other_calls += 1
            is_for_good = self._other_calls > OTHER_CALLS or not all(each.recorded for each in ranks)
            return self._renew() if is_for_good else Decision.COMPUTE
        self._other_calls = 0
        if any(each.is_stale for each in ranks):
            return self._renew()
        return Decision.TRY if any(each.is_due for each in ranks) else Decision.PLAY

    def _renew(self) -> Decision:
        """Let all be recorded anew, in one later forward."""
        self.recorder.renew_all()
        self._calls = self._other_calls = 0
        for each in self._all:
            each.drop()
        self.recorder.let_go()
        return Decision.COMPUTE

    def end(self) -> None:
        """Play nothing any more, and destroy what is recorded."""
        self.why_ended = self.why_ended or ""
        for each in self._all:
            each.drop()
        self.recorder.reset()

    def _end(self, why: str) -> Decision:
        self.why_ended = why
        return Decision.COMPUTE


def _num_tokens(found: Given | None) -> int:
    """Of a block's call; -1 where it cannot be recorded."""
    return -1 if found is None else sum(each.shape[:-1].numel() for each in found.tensors[:1])


def _why_unusual(tokens: Sequence[int]) -> str:
    """Of the last forward, on all ranks."""
    if min(tokens) < 0:
        return ""
    if min(tokens) != max(tokens):
        return f"other numbers of tokens on other ranks, {min(tokens):,} to {max(tokens):,} in one step"
    if 0 < max(tokens) <= MOST_TOKENS:
        return "no three forwards in a row with as many tokens, or none without another's backward to come"
    return f"{max(tokens):,} tokens on each rank: some, and {MOST_TOKENS:,} at most"
