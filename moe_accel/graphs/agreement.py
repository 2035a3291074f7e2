"""What all ranks do with the blocks that they record together, in one forward of the model: they agree on it.

At the first block of a forward each rank tells all others, through their hosts, what it knows (`State`); what follows
from all states is the same on every rank. A rank for itself decides nothing: it would exchange tokens with nobody.

Where all have the same number of tokens three times in a row, blocks are recorded for so many; else, where only that
changes, for the most that any rank has had in some forwards.
"""

import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_accel.graphs.calls import Given
from moe_accel.graphs.module import CALLS, OTHER_CALLS, RECORDINGS
from moe_accel.graphs.recorder import Recorder
from moe_accel.graphs.sizes import AS_GIVEN, MOST_TOKENS, RAGGED, AsGiven, Extent, Seen, by_token, extent_of, most_alike
from moe_accel.ranks import group_of_hosts

WAITING = 100
"""Forwards without three alike on all ranks, after which they stop to ask each other."""


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
        is_alike: whether this one is as the one before but for the number of tokens, of which a block may be given any.
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
    is_alike: bool
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
        self._capacity: Extent | None = None  # for which blocks are recorded
        self._group: Any = None
        # Blocks, which have this: in this forward, in the one before, and ever.
        self._called: list[weakref.ref[Any]] = []
        self._members: list[weakref.ref[Any]] = []
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kind: Any = None
        self._kind_by_token: Any = None
        self._begins = True
        self._tokens = -1
        self._calls = self._other_calls = self._waited = 0
        self._seen = Seen()

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
            self._tokens = extent_of(found).tokens
            self.decision = self._decide(self._of_all_ranks(self._state(block, found)))
        elif any(each() is block for each in self._called):
            block.why_not = "called more than once in a forward"
        elif found is not None and extent_of(found).tokens != self._tokens >= 0:
            block.why_not = "called with another number of tokens than the first block, which alone ranks compare"
        self._called.append(weakref.ref(block))
        return self.decision

    def sizes_for(self, found: Given) -> AsGiven:
        """What such a call is recorded for, where that was decided."""
        return AS_GIVEN if self._capacity is None else self.recorder.capacity(self._capacity, found)

    def _state(self, first: Any, found: Given | None) -> State:
        self._calls = self._calls + 1 if found is not None and found.kind == self._kind else int(found is not None)
        kind = found and by_token(found)
        is_alike = kind is not None and kind == self._kind_by_token
        self._kind, self._kind_by_token = found and found.kind, kind
        members = [each for each in (each() for each in self._members) if each is not None]
        recorded = [each for each in members if each.recording is not None]
        own, recorder = first.recording, self.recorder
        is_busy = any(each.recording.is_pending for each in recorded)
        about_to_record = not recorded and (self._calls > CALLS or self._seen.calls >= RAGGED)
        return State(
            num_tokens=self._tokens,
            calls=self._calls,
            is_alike=is_alike,
            has_ended=recorder.has_failed or any(each.has_ended(about_to_record) for each in self._all),
            may_record=recorder.may_record,
            recorded=bool(recorded),
            fits=own is not None and found is not None and own.takes(found),
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
        is_ragged = self._note(ranks)
        is_recorded = any(each.recorded for each in ranks)
        self._waited = 0 if is_recorded else self._waited + 1
        if any(each.has_ended for each in ranks):
            return self._end("")
        if self._waited > WAITING:
            return self._end(_why_unusual(tokens))
        if is_recorded:
            return self._of_recorded(ranks, is_ragged)
        is_usual = 0 < min(tokens) == max(tokens) <= most_alike(len(ranks))
        self._calls = self._calls if is_usual else 0
        are_alike = is_usual and min(each.calls for each in ranks) > (OTHER_CALLS if self.recorder.varies else CALLS)
        are_enough = is_ragged and self._seen.are_enough
        if not (are_alike or are_enough) or not all(each.may_record for each in ranks):
            return Decision.COMPUTE
        self._capacity = None if are_alike else self._seen.capacity()
        return Decision.RECORD

    def _note(self, ranks: Sequence[State]) -> bool:
        """Whether all calls are like those before but for their tokens, and there may be room for so many."""
        if all(each.is_alike for each in ranks):
            return self._seen.note([Extent(each.num_tokens) for each in ranks], MOST_TOKENS)
        self._seen.forget()
        return False

    def _of_recorded(self, ranks: Sequence[State], is_ragged: bool) -> Decision:
        is_busy = any(each.is_busy for each in ranks)
        if not all(each.fits for each in ranks) or is_busy:
            self._other_calls += 1
            is_for_good = self._other_calls > OTHER_CALLS or not all(each.recorded for each in ranks)
            may_be_again = is_ragged and not is_busy and all(each.recorded < RECORDINGS for each in self._all)
            if may_be_again and self._seen.misses():
                self.recorder.varies = is_for_good = True
            return self._renew() if is_for_good else Decision.COMPUTE
        self._other_calls = 0
        self._seen.fits()
        if any(each.is_stale for each in ranks):
            return self._renew()
        return Decision.TRY if any(each.is_due for each in ranks) else Decision.PLAY

    def _renew(self) -> Decision:
        """Let all be recorded anew, in one later forward."""
        self.recorder.renew_all()
        self._calls = self._other_calls = 0
        self._seen.begin_again()
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


def _why_unusual(tokens: Sequence[int]) -> str:
    """Of the last forward, on all ranks."""
    if min(tokens) < 0:
        return ""
    most = most_alike(len(tokens)) if min(tokens) == max(tokens) else MOST_TOKENS
    if min(tokens) > 0 and max(tokens) <= most:
        return "no forwards in a row that are alike, or none without another's backward to come"
    told = f"{max(tokens):,}" if min(tokens) == max(tokens) else f"{min(tokens):,} to {max(tokens):,}"
    return f"{told} tokens on each rank: some, and {most:,} at most"
