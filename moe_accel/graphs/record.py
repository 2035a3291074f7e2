"""Forward and backward of a module as two CUDA graphs, and autograd around them."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from moe_accel import garbage
from moe_accel.graphs.calls import Given, Unusual, Watched, kind_of, packed_in, with_tensors
from moe_accel.graphs.trial import Round, Trial


class Recorder:
    """How the graphs of one model are recorded: in one pool of memory, by one stream beside torch's own.

    Graphs are played one after the other on one stream. So memory that a graph needs no longer than until what it made
    is copied is that of graphs recorded later, too: recorded tensors are let go of, and read by `borrow`. It may be
    theirs for what they keep for backward. So no graph is played while the backward of one recorded later is to come:
    layers are recorded in their order, played forward in it and backward in the reverse.

    Attributes:
        has_told: whether somebody was told why nothing is recorded.
        has_failed: whether recording was ended by an error, after which nothing more is recorded.
        era: changes when all that was recorded before is to be recorded anew, in later forwards of the model.
        round: of trials; another one whenever something is recorded, is to be, or was wrong.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None
        self._graphs: list[Any] = []  # of this era: torch takes from all of a stream what they share when one goes
        self._recorded_era = -1
        self._played_on: int | None = None
        self.has_told, self.has_failed, self.era, self.round = False, False, 0, Round()
        self._num_recorded = self._forwards = self._since = 0
        self._called: weakref.WeakSet[Any] = weakref.WeakSet()  # in this forward of the model
        # Those whose backward may come, in the order in which they were recorded. References: what has this has them.
        self._waiting: list[weakref.ref[Recording]] = []
        self._gradients: dict[Any, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> "Recorder":
        copied = memo[id(self)] = type(self)()
        return copied

    def __reduce__(self) -> tuple:
        return type(self), ()

    def number(self) -> int:
        """Of the recording that is made now, which may spoil what others read."""
        self._num_recorded += 1
        self.round.number += 1
        return self._num_recorded

    def sees(self, graphs: Any) -> bool:
        """Whether a call of the module that has these counts: in the forward of the model in which all were let go of,
        it does not, so that all are recorded in one forward again."""
        if graphs in self._called:
            self._called.clear()
            self._forwards += 1
        self._called.add(graphs)
        return self._forwards >= self._since

    def is_for(self, stream: int | None) -> bool:
        """Whether what is recorded is played on this stream: one for all."""
        self._played_on = stream if self._played_on is None else self._played_on
        return stream == self._played_on

    def renew(self, recording: "Recording") -> None:
        """Let all that was recorded with this one be recorded anew: by itself it would come after the others."""
        if recording.era == self.era:
            self.era, self._since = self.era + 1, self._forwards + 1

    def may_play(self, recording: "Recording") -> bool:
        """Whether no recorded forward is waiting for its backward that this one would take memory from."""
        while self._waiting:
            last = self._waiting[-1]()
            if last is not None and last.is_pending:
                return last.number < recording.number
            self._waiting.pop()
        return True

    @property
    def may_record(self) -> bool:
        """Whether all forwards that wait for their backward are trials, which see what recording spoils."""
        waiting = [each for each in (each() for each in self._waiting) if each is not None and each.is_pending]
        return not any(each.is_alone for each in waiting)

    def played_forward(self, recording: "Recording") -> None:
        """Its backward may come now."""
        self._waiting.append(weakref.ref(recording))

    def plays_backward(self, recording: "Recording") -> None:
        """What was recorded later can have no backward from now on."""
        while self._waiting:
            later = self._waiting[-1]()
            if later is not None and later.number < recording.number:
                break
            self._waiting.pop()
            if later is not None:
                later.forget()

    def gradient(self, at: int, like: Tensor) -> Tensor:
        """Where the gradient of an output is read, which is needed for a moment: all recordings have it."""
        key = at, like.shape, like.dtype, like.device
        if key not in self._gradients:
            self._gradients[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._gradients[key]

    def borrow(self, tensor: Tensor) -> Tensor:
        """The same values at the same address, which does not keep the memory; the tensor itself if it has gaps."""
        if not tensor.is_contiguous() or not tensor.numel():
            return tensor
        return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream that records."""
        if self._recorded_era != self.era:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._recorded_era = self.era
            self._graphs.clear()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What starts again all that `work` starts on the GPU; and what `work` made, whose values then change."""
        graph = torch.cuda.CUDAGraph()
        with garbage.left_alone():  # a model that goes would take its graphs along, and spoil this one (pytorch#161037)
            try:
                # Other threads, such as NCCL's, may go on with what this one must not do while it records.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                made = work()
                graph.capture_end()
            except BaseException:
                self.has_failed = True
                for end in (graph.capture_end, self._leave_pool, self._record_nothing):
                    with suppress(RuntimeError):  # what went wrong before is what the caller wants to know
                        end()
                raise
        self._graphs.append(graph)
        return graph.replay, made

    def _leave_pool(self) -> None:
        """What torch does at the end of a recording, unless that fails."""
        internals: Any = torch._C
        internals._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)

    def _record_nothing(self) -> None:
        """Let torch's random numbers be as outside of recordings again, which a failed one leaves as inside."""
        graph, one = torch.cuda.CUDAGraph(), torch.ones(1, device="cuda")
        graph.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        one.fill_(1)
        graph.capture_end()

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Raise RuntimeError where the host waits for the GPU, which a recording cannot and is spoiled by."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class _Memory:
    """Of a tensor, as bytes, for what reads `__cuda_array_interface__`."""

    def __init__(self, tensor: Tensor):
        shape, data = (tensor.numel() * tensor.element_size(),), (tensor.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "version": 3}


class _Token:
    """Alive as long as the backward of a forward may come."""


class Played(NamedTuple):
    """A forward.

    Attributes:
        turn: how many were before it, and it.
        outputs: the caller's own.
        own: in a trial, the module's own outputs, with what autograd knows of them.
    """

    turn: int
    outputs: list[Tensor]
    own: list[Tensor] | None


class Recording:
    """Of one module, for one kind of call.

    What backward needs has memory of its own, which the recorded forward's part of autograd's graph holds here.

    Attributes:
        kind: of the calls that it can play.
        watched: the module as it was.
        number: how many were recorded before it, and it.
        num_played: how often its forward was played.
        era: of the recorder, when it was recorded.
        trial: of what it plays.
        is_alone: whether its last forward was no trial.
        wants: whether each output has a gradient.
    """

    def __init__(self, recorder: Recorder, watched: Watched, call: Callable, args: tuple, kwargs: dict, found: Given):
        """Record `call`.

        Raises:
            Unusual: it is on another stream than those before, or its output is neither tensors nor plain.
            RuntimeError: it does what a graph cannot.
        """
        self.kind, self.watched = found.kind, watched
        self.num_played, self._turn, self.is_alone = 0, None, False
        self.number, self.era, self._recorder = recorder.number(), recorder.era, recorder
        self.trial = Trial(recorder.round)
        self._trained, self._pending = watched.trained(), None
        self._autocast, self._device_type = found.autocast, recorder.device_type
        self._inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in found.tensors]
        args, items = with_tensors((args, tuple(kwargs.items())), iter(self._inputs))
        self._given = args, dict(items)
        self._packed = packed_in(args, dict(items))  # where their sequences begin is read from there
        # The same memory under other names: autograd ties what accumulates a gradient to the stream of its first use.
        self._aliases = {each: nn.Parameter(each.detach()) for each in self._trained}
        self._leaves = [*self._inputs, *self._aliases.values()]
        self._sources = [each for each in self._leaves if each.requires_grad]
        if not recorder.is_for(found.stream):
            raise Unusual("another stream")
        # Backward is recorded in a forward, and must not be under its autocast; forward sets its own.
        with recorder.beside(), torch.autocast(self._device_type, enabled=False):
            with recorder.refusing_to_wait():  # what is made at a first call is made here, not recorded
                _, outputs = self._compute(call)
            wanting = [each.detach() for each in outputs if each.requires_grad]
            self._gradients = [recorder.gradient(*each) for each in enumerate(wanting)]
            self._differentiate(outputs)
            self._forward, (made, outputs) = recorder.record(partial(self._compute, call))
            self._backward, self._found = recorder.record(partial(self._differentiate, outputs))
            self.wants = [each.requires_grad for each in outputs]
            # By the edge: in torch 2.11 a Function's `grad_fn`, its ctx, does not keep what leads to it.
            self._held = [get_gradient_edge(each) for each in outputs if each.requires_grad]
            self._outputs = [recorder.borrow(each.detach()) for each in outputs]
            self._found = [None if each is None else recorder.borrow(each) for each in self._found]
            self._made = with_tensors(made, iter(self._outputs))

    def _compute(self, call: Callable) -> tuple[Any, list[Tensor]]:
        """What `call` makes of the inputs that were copied here, and the tensors in it."""
        args, kwargs = self._given
        on, dtype = self._autocast
        outputs: list[Tensor] = []
        # Casts are recorded, not remembered: autocast's cache is of another moment.
        autocast = torch.autocast(self._device_type, dtype, enabled=on, cache_enabled=False)
        with self.watched.replaced(self._aliases), torch.enable_grad(), autocast:
            made = call(*args, **kwargs)
        kind_of(made, outputs)
        return made, outputs

    def _differentiate(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of inputs and parameters that want one, in this order."""
        wanting = [each for each in outputs if each.requires_grad]
        return list(torch.autograd.grad(wanting, self._sources, self._gradients, allow_unused=True, retain_graph=True))

    @property
    def is_pending(self) -> bool:
        """Whether the backward of the last forward may still come: until then its values must stay."""
        return self._pending is not None and self._pending() is not None

    def forget(self) -> None:
        """Let no backward come for what was played."""
        self._turn = None

    def play(self, tensors: Sequence[Tensor], call: Callable) -> Any:
        """The output for such tensors of the module, which does `call` itself."""
        outputs: Any = _Play.apply(self, call if self.trial.is_due else None, len(tensors), *tensors, *self._trained)
        return with_tensors(self._made, iter(outputs))

    def forward(self, tensors: Sequence[Tensor], token: _Token, call: Callable | None) -> Played:
        """Play it.

        Args:
            tensors: for the recorded ones.
            token: lives until backward is over, or cannot come.
            call: for a trial, what the module does itself; its outputs are what is used then.
        """
        _copy([each.detach() for each in self._inputs], tensors)
        self._forward()
        self.num_played += 1
        self._turn, self._pending, self.is_alone = self.num_played, weakref.ref(token), call is None
        self._recorder.played_forward(self)
        if call is None:
            return Played(self.num_played, _owned(self._outputs), None)
        _copy([each.data for each in self._inputs], tensors)  # it may have changed them, and keeps them as they were
        _, own = self._compute(call)
        self.trial.compare_outputs(self._outputs, own)
        return Played(self.num_played, _owned(own), own)

    def backward(self, turn: int, gradients: Sequence[Tensor], own: list[Tensor] | None) -> list[Tensor | None]:
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
        _copy(self._gradients, wanted)
        if not self.trial.problem:
            self._backward()
        if own is None:
            found = _owned_where_any(self._found)
        else:
            found = _owned_where_any(self._differentiate(own))
            if not self.trial.problem:
                self.trial.compare_gradients(self._found, found, self._gradients)
        of_sources = iter(found)
        # As it was recorded: what wants a gradient by now is for autograd to know.
        return [next(of_sources) if each.requires_grad else None for each in self._leaves]


class _Play(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, call: Callable | None, num_inputs: int, *tensors: Tensor) -> Any:
        ctx.recording, ctx.token = recording, _Token()
        ctx.turn, outputs, ctx.own = recording.forward(tensors[:num_inputs], ctx.token, call)
        ctx.mark_non_differentiable(*(each for each, wants in zip(outputs, recording.wants, strict=True) if not wants))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, ctx.own, ctx.token = ctx.own, None, None
        return None, None, None, *ctx.recording.backward(ctx.turn, gradients, own)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for dtype in {each.dtype for each in targets}:  # one kernel each
        pairs = [(one, other) for one, other in zip(targets, sources, strict=True) if one.dtype == dtype]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [one for one, _ in pairs], [other for _, other in pairs]
        )


def _owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(each) for each in tensors]
    _copy(copies, [each.detach() for each in tensors])
    return copies


def _owned_where_any(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    copies = iter(_owned([each for each in tensors if each is not None]))
    return [None if each is None else next(copies) for each in tensors]
