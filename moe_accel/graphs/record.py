"""Forward and backward of a module as two CUDA graphs, and autograd around them."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from moe_accel.experts.later import Product, Products
from moe_accel.experts.weights import local
from moe_accel.graphs import captured
from moe_accel.graphs.calls import Given, Unusual, Watched, kind_of, with_tensors
from moe_accel.graphs.recorder import Recorder
from moe_accel.graphs.sizes import AS_GIVEN, AsGiven, copies_to_differentiate, copy
from moe_accel.graphs.trial import Trial


class _Token:
    """Alive as long as the backward of a forward may come."""


class Played(NamedTuple):
    """A forward.

    Attributes:
        turn: how many were before it, and it.
        outputs: the caller's own.
        own: in a trial, the module's own outputs, with what autograd knows of them, and the leaves they come from.
    """

    turn: int
    outputs: list[Tensor]
    own: tuple[list[Tensor], list[Tensor]] | None


class Recording:
    """Of one module, for one kind of call.

    What backward needs has memory of its own, which the recorded forward's part of autograd's graph holds here.

    Attributes:
        kind: of the calls that it can play, see `takes`.
        watched: the module as it was.
        sizes: what it is recorded for.
        number: how many were recorded before it, and it.
        num_played: how often its forward was played.
        era: of the recorder, when it was recorded.
        trial: of what it plays.
        is_alone: whether its last forward was no trial.
        wants: whether each output has a gradient.
    """

    def __init__(
        self,
        recorder: Recorder,
        watched: Watched,
        call: Callable,
        found: Given,
        around: Callable[[Products], AbstractContextManager] | None = None,
        sizes: AsGiven = AS_GIVEN,
    ):
        """Record `call`.

        Args:
            recorder: of the model.
            watched: the module as it is.
            call: what the module does itself.
            found: what the call was given.
            around: in which it is recorded, as ranks do that exchange tokens in it; a trial is computed without. They
                play it together, also where one of them has found a fault. It is given a list for the gradients that
                its backward leaves to be computed.
            sizes: what it is recorded for.

        Raises:
            Unusual: it is on another stream than those before, or its output is neither tensors nor plain, or its
                tensors are not of such sizes.
            RuntimeError: it does what a graph cannot.
        """
        self.kind, self.watched, self.sizes = sizes.kind_of(found), watched, sizes
        if self.kind is None:
            raise Unusual("tensors that are not of each token")
        self.num_played, self._turn, self.is_alone = 0, None, False
        self.number, self.era, self._recorder = recorder.number(), recorder.era, recorder
        self.trial, self._around = Trial(recorder.round, exactly=around is None and sizes is AS_GIVEN), around
        self._trained, self._pending = watched.trained(), None
        self._later: list[Product] = []
        self._left = Products(recorder.mark)  # by the backward that is recorded
        self._autocast, self._device_type = found.autocast, recorder.device_type
        self._inputs, self._given = sizes.room_for(found)
        self._aliases = self._aliased()
        self._leaves = [*self._inputs, *self._aliases.values()]
        self._sources = [each for each in self._leaves if each.requires_grad]
        self._num_inputs = sum(each.requires_grad for each in self._inputs)  # among those
        # Backward is recorded in a forward, and must not be under its autocast; forward sets its own.
        with recorder.beside(), torch.autocast(self._device_type, enabled=False):
            with recorder.refusing_to_wait():  # what is made at a first call is made here, not recorded
                (made, logits), outputs = self._compute_recorded(call)
            sizes.check((made, logits))
            wanting = [each.detach() for each in outputs if each.requires_grad]
            self._gradients = [recorder.gradient(*each) for each in enumerate(wanting)]
            self._differentiate_recorded(outputs)
            self._left.clear()
            if not recorder.is_for(found.stream):  # only now: other ranks have computed with this one
                raise Unusual("another stream")
            if recorder.has_failed:
                raise Unusual("an error in what was recorded before")
            self._forward, (made, outputs) = recorder.record(partial(self._compute_recorded, call))
            self._backward, self._found = recorder.record(partial(self._differentiate_recorded, outputs))
            self.wants = [each.requires_grad for each in outputs]
            # By the edge: in torch 2.11 a Function's `grad_fn`, its ctx, does not keep what leads to it.
            self._held = [get_gradient_edge(each) for each in outputs if each.requires_grad]
            self._outputs = [recorder.borrow(each.detach()) for each in outputs]
            self._found = [None if each is None else recorder.borrow(each) for each in self._found]
            self._later = [each._replace(operands=tuple(map(recorder.borrow, each.operands))) for each in self._left]
            self._left.clear()
            self._made = with_tensors(made, iter(self._outputs))

    def _compute_recorded(self, call: Callable) -> tuple[Any, list[Tensor]]:
        with nullcontext() if self._around is None else self._around(self._left):
            return self._compute(call, self._given, self._aliases)

    def _aliased(self) -> dict[Tensor, nn.Parameter]:
        """Parameters, and the same memory under other names: autograd ties what accumulates a gradient to the stream of
        its first use, which for what is recorded is another one."""
        return {each: nn.Parameter(local(each).detach()) for each in self._trained}

    def _compute(
        self, call: Callable, given: tuple[Any, Any], aliases: Mapping[Tensor, Tensor]
    ) -> tuple[Any, list[Tensor]]:
        """What `call` makes of arguments and named ones with router logits that are taken, and the tensors in both."""
        args, named = given
        on, dtype = self._autocast
        outputs: list[Tensor] = []
        # Casts are recorded, not remembered: autocast's cache is of another moment.
        autocast = torch.autocast(self._device_type, dtype, enabled=on, cache_enabled=False)
        with self.watched.replaced(aliases), torch.enable_grad(), autocast, captured.apart() as logits:
            made = call(*args, **dict(named))
        kind_of((made, logits), outputs, [])
        return (made, logits), outputs

    def _differentiate_recorded(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        self._left.clear()
        return _differentiate(outputs, self._sources, self._gradients)

    def _found_later(self) -> list[Tensor | None]:
        """What was found, with the gradients that backward left to be computed, which are nobody else's."""
        found = list(self._found)
        for each, gradient in zip(self._later, self._recorder.compute_beside(self._later), strict=True):
            at = next(at for at, one in enumerate(self._sources) if one.data_ptr() == each.matrices.data_ptr())
            is_turned, before = each.matrices.stride() != self._sources[at].stride(), found[at]
            gradient = gradient.transpose(1, 2) if is_turned else gradient
            found[at] = gradient if before is None else before + gradient
        return found

    @property
    def is_pending(self) -> bool:
        """Whether the backward of the last forward may still come: until then its values must stay."""
        return self._pending is not None and self._pending() is not None

    def forget(self) -> None:
        """Let no backward come for what was played."""
        self._turn = None

    def takes(self, found: Given) -> bool:
        """Whether such a call may be played."""
        return self.sizes.takes(self.kind, found)

    def may_begin(self, found: Given) -> bool:
        """Whether no backward is to come for a call of another size."""
        return self.sizes.holds(found) or not self._recorder.is_read(self.sizes)

    def play(self, found: Given, call: Callable, tries: bool = False) -> Any:
        """The output of the module for such a call, which does `call` itself in a trial.

        tries: whether it is one, for what ranks play together.
        """
        is_tried = tries if self._around is not None else self.trial.is_due  # what is played together is tried so
        outputs: Any = _Play.apply(self, call if is_tried else None, found, *found.tensors, *map(local, self._trained))
        made, logits = with_tensors(self._made, iter(outputs))
        captured.hand_on(logits)
        return made

    def forward(self, found: Given, token: _Token, call: Callable | None) -> Played:
        """Play it.

        Args:
            found: what was given to the module.
            token: lives until backward is over, or cannot come.
            call: for a trial, what the module does itself; its outputs are what is used then.
        """
        self.sizes.begin(found)
        self.sizes.fill([each.detach() for each in self._inputs], found.tensors)
        self._forward()
        self.num_played += 1
        self._turn, self._pending, self.is_alone = self.num_played, weakref.ref(token), call is None
        self._recorder.played_forward(self)
        outputs = [each for each in self.sizes.cut(self._outputs) if each is not None]
        if call is None:
            return Played(self.num_played, _owned(outputs), None)
        inputs = copies_to_differentiate(found.tensors)  # which it may change
        aliases = self._aliased()
        _, own = self._compute(call, with_tensors(found.structure, iter(inputs)), aliases)
        self.trial.compare_outputs(outputs, own)
        sources = [each for each in (*inputs, *aliases.values()) if each.requires_grad]
        return Played(self.num_played, _owned(own), (own, sources))

    def backward(
        self, turn: int, gradients: Sequence[Tensor], own: tuple[list[Tensor], list[Tensor]] | None
    ) -> list[Tensor | None]:
        """Gradients of inputs, then of parameters, which are the caller's own; None where there is none.

        Args:
            turn: of the forward.
            gradients: of the outputs.
            own: as the forward returned it.

        Raises:
            RuntimeError: it was played for that turn before, or what it needs was replaced.
        """
        if turn != self._turn:
            raise RuntimeError(
                "cuda_graphs: the values that this backward needs are gone: a forward has one backward "
                "(no retain_graph=True), before the next forward\n"
                "hint: moe_config: {cuda_graphs: false}"
            )
        self._recorder.plays_backward(self)  # as earlier layers will
        wanted = [one for one, wants in zip(gradients, self.wants, strict=True) if wants]
        self.sizes.fill(self._gradients, wanted)
        if self._around is not None or not self.trial.problem:
            self._backward()
        found = self._found_later()
        lent = [one is not None and one is other for one, other in zip(self._found, found, strict=True)]
        found = [*self.sizes.cut(found[: self._num_inputs]), *found[self._num_inputs :]]
        if own is None:
            found = _owned_where(lent, found)
        else:
            played, found = found, _differentiate(*own, wanted)
            found = _owned_where([each is not None for each in found], found)
            if not self.trial.problem:
                self.trial.compare_gradients(played, found, wanted)
        of_sources = iter(found)
        # As it was recorded: what wants a gradient by now is for autograd to know.
        return [next(of_sources) if each.requires_grad else None for each in self._leaves]


class _Play(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, call: Callable | None, found: Given, *_: Tensor) -> Any:
        ctx.recording, ctx.token = recording, _Token()
        ctx.turn, outputs, ctx.own = recording.forward(found, ctx.token, call)
        ctx.mark_non_differentiable(*(each for each, wants in zip(outputs, recording.wants, strict=True) if not wants))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, ctx.own, ctx.token = ctx.own, None, None
        return None, None, None, *ctx.recording.backward(ctx.turn, gradients, own)


def _differentiate(
    outputs: Sequence[Tensor], sources: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of sources, by those of the outputs that want one."""
    wanting = [each for each in outputs if each.requires_grad]
    return list(torch.autograd.grad(wanting, sources, gradients, allow_unused=True, retain_graph=True))


def _owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(each) for each in tensors]
    copy(copies, [each.detach() for each in tensors])
    return copies


def _owned_where(lent: Sequence[bool], tensors: Sequence[Any]) -> list[Tensor | None]:
    """Copies of those that are `lent`, and the others as they are."""
    copies = iter(_owned([each for each, is_lent in zip(tensors, lent, strict=True) if is_lent]))
    return [next(copies) if is_lent else each for each, is_lent in zip(tensors, lent, strict=True)]
