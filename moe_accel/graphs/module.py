"""Graphs of one module, and when they are played: by what this rank sees of its calls."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from moe_accel.backward import in_backward
from moe_accel.graphs.calls import Given, Unusual, Watched, given
from moe_accel.graphs.record import Recording
from moe_accel.graphs.recorder import Recorder
from moe_accel.graphs.sizes import AS_GIVEN, MOST_TOKENS, AsGiven, OneRow, Seen, by_token_of_one_row, extent_of

CALLS = 2
"""Calls of a kind, one after the other, that are computed as ever before it is recorded."""
OTHER_CALLS = 50
"""Calls of another kind, one after the other, for which what is recorded is recorded anew."""
OPEN = 50
"""Trials, one after the other, that say nothing, before somebody is told."""
PASSED_BY = 10
"""Calls that cannot be recorded, one after the other, before somebody is told."""
RECORDINGS = 3
"""Of one module, at most: where parameters move every time, graphs are not worth it."""
LONG = 25
"""Times that one was played, after which it was worth it."""


class Graphs:
    """Of one module: what was seen of its calls, and what is recorded.

    Attributes:
        recorder: of the model.
        owner: reference to the module.
        recording: what is recorded, of the kind of call that came three times in a row.
        kind: of the last call.
        calls: so many of this kind came one after the other, without a recording of it.
        seen: of those that are not of a kind with what is recorded.
        passed_by: so many came one after the other that cannot be recorded.
        recorded: how often it was; more than `RECORDINGS` if it is given up.
        put_off: so often it was not, one after the other, because others were played without a trial.
        gathered: FSDP2's objects for its parameters, which leave them their memory.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.owner: Any = None
        self.recording: Recording | None = None
        self.kind: Any = None
        self.seen, self._kind_by_token = Seen(), None
        self.calls = self.passed_by = self.recorded = self.put_off = 0
        self.gathered: list[Any] = []

    def __deepcopy__(self, memo: dict) -> "Graphs":
        copied = memo[id(self)] = Graphs(memo.get(id(self.recorder)) or self.recorder.__deepcopy__(memo))
        return copied

    def __reduce__(self) -> tuple:
        return Graphs, (self.recorder,)

    def call(self, module: nn.Module, own: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, played if that is as good."""
        self.own(module)
        is_replica = self.owner() is not module  # of DataParallel, with the attributes of its model
        if self.recording is not None and self.recording.trial.problem and self.recorded <= RECORDINGS:
            self._refuse(module, self.recording.trial.problem)
        if self.recorder.has_failed or self.recorded > RECORDINGS:
            self._let_go()
            return own(*args, **kwargs)
        if is_replica:
            return own(*args, **kwargs)
        try:
            check_surroundings()
            found = given(self.recorder.device_type, args, kwargs)
        except Unusual as unusual:
            self._pass_by(module, str(unusual))
            return own(*args, **kwargs)
        counts = self.recorder.sees(self)
        if self.recording is not None and self.recording.era != self.recorder.era:
            self.drop()
        takes = self.recording is not None and self.recording.takes(found)
        if counts and not takes:
            takes = self._count(module, own, found)
        recording = self.recording
        if recording is None or not takes or recording.is_pending or not recording.may_begin(found):
            return own(*args, **kwargs)
        if not (recording.watched.is_same(module) and self.recorder.may_play(recording)):
            self.recorder.renew(recording)
            self.drop()
            return own(*args, **kwargs)
        self.calls = self.passed_by = 0
        if self.seen.has_missed:
            self.seen.fits(as_much=recording.sizes is AS_GIVEN and by_token_of_one_row(found) is None)
        self.tell_if_open(module, recording)
        return recording.play(found, own)

    def own(self, module: nn.Module) -> None:
        """Know whose they are, from the first call on."""
        self.owner = self.owner or weakref.ref(module)

    def drop(self) -> None:
        """Forget what is recorded; if it was of use for long, how often it was recorded, too."""
        if self.recording is not None and self.recording.num_played > LONG:
            self.recorded = 0
        self.recording, self.calls = None, 0
        self.seen.begin_again()

    def _count(self, module: nn.Module, own: Callable, found: Given) -> bool:
        """Of calls for which nothing is recorded: record, where they are alike; whether that was done."""
        is_ragged = self._note(found)
        self.calls, self.kind = self.calls + 1 if found.kind == self.kind else 1, found.kind
        if self.recording is not None:
            has_too_little_room = is_ragged and self.seen.misses() and self.recorded < RECORDINGS
            self.recorder.varies |= has_too_little_room
            if self.calls > OTHER_CALLS or has_too_little_room:
                self.recorder.renew(self.recording)
            return False
        if self.calls > (OTHER_CALLS if self.recorder.varies else CALLS):
            self._record(module, own, found, AS_GIVEN)
        elif is_ragged and self.seen.are_enough:
            # More than was seen: of several ranks one without room lets all others wait, and attention takes little.
            self._record(module, own, found, self.recorder.capacity(self.seen.capacity(eighths=1), found, OneRow))
        elif self.calls == 1 and not (is_ragged or self.seen.is_constant):
            self._pass_by(module, "calls of which no three are alike")
        return self.recording is not None

    def _note(self, found: Given) -> bool:
        """Whether this call is like those before but for its tokens, and there may be room for so many."""
        kind = by_token_of_one_row(found)
        if kind is None:  # several rows: they come between those that are alike
            return False
        if kind != self._kind_by_token:
            self._kind_by_token = kind
            self.seen.forget()
            return False
        return self.seen.note([extent_of(found)], MOST_TOKENS, constant=True)

    def _pass_by(self, module: nn.Module, reason: str) -> None:
        """Say once of a model why nothing is recorded, where it goes on like this."""
        self.passed_by += 1
        if self.passed_by > PASSED_BY and self.recording is None:
            self._tell(module, f"computed without a CUDA graph so far, because of {reason}")

    def _tell(self, module: nn.Module, what: str) -> None:
        """Say once of a model what is not as it should be."""
        if not self.recorder.has_told:
            self.recorder.has_told = True
            warnings.warn(f"{type(module).__name__} is {what}", stacklevel=2)

    def tell_if_open(self, module: nn.Module, recording: Recording) -> None:
        """Say once of a model that its trial goes on and on."""
        if recording.trial.num_open > OPEN:
            self._tell(module, "recorded, and not used so far: its gradients were zero, infinite or not asked for")

    def _record(self, module: nn.Module, own: Callable, found: Given, sizes: AsGiven) -> None:
        watched = Watched(module)
        if not (watched.trained() or any(each.requires_grad for each in found.tensors)):
            self.calls = -OTHER_CALLS  # nothing to train yet
            self.seen.forget()
            return
        if not self.recorder.may_record:
            self._put_off(module)
            return
        self.recorded, self.put_off = self.recorded + 1, 0
        problem = watched.problem()
        if self.recorded > RECORDINGS:
            problem = "its calls overlap, or its parameters or attributes change, all the time"
        if not problem:
            try:
                self.recording = Recording(self.recorder, watched, own, found, sizes=sizes)
            except (RuntimeError, Unusual) as error:
                problem = str(error).strip().partition("\n")[0]
        if problem:
            self._refuse(module, problem)

    def _put_off(self, module: nn.Module) -> None:
        """Let all others be tried in the next forward, so that it may be recorded then; but not for ever."""
        self.put_off += 1
        if self.put_off <= PASSED_BY:
            self.recorder.round.number += 1
        else:
            self._tell(
                module,
                "computed without a CUDA graph so far, because of forwards without a backward, or of "
                "calls that are not alike",
            )

    def _refuse(self, module: nn.Module, problem: str) -> None:
        """Compute it as ever from now on, and say why."""
        self.recorded = RECORDINGS + 1
        self._let_go()
        warnings.warn(f"{type(module).__name__} is computed without a CUDA graph: {problem}", stacklevel=2)

    def _let_go(self) -> None:
        """Of what is not used any more, and of gathered weights; not before a backward that reads them."""
        if self.recording is not None and self.recording.is_pending:
            return
        self.recording = None
        for parameter in self.gathered:
            vars(parameter).pop("free_unsharded_param", None)
        self.gathered.clear()


def check_surroundings() -> None:
    """Raise Unusual where somebody looks at all modules, or drops, moves or makes anew what is saved for backward."""
    internals: Any = torch._C
    hooks = internals._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None or in_backward():
        raise Unusual("checkpointing, or other hooks on what is saved for backward")
    if _has_any_global_hook():
        raise Unusual("global hooks of modules")


class Graphed(nn.Module):
    """What a recorded module does instead."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Played, where it is training as usual; else its own."""
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return self._moe_accel_graphs.call(self, super().forward, args, kwargs)
