"""How CUDA graphs are recorded, and which of those that share memory may be played when."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from moe_accel import garbage
from moe_accel.experts.later import Product
from moe_accel.graphs.calls import Given
from moe_accel.graphs.sizes import AsGiven, Capacity, Extent
from moe_accel.graphs.trial import Round


class Recorder:
    """How graphs of a model's attention, or of its blocks, are recorded: in one pool of memory, by one stream beside
    torch's own.

    Graphs are played one after the other on one stream. So memory that a graph needs no longer than until what it made
    is copied is that of graphs recorded later, too: recorded tensors are let go of, and read by `borrow`. It may be
    theirs for what they keep for backward. So no graph is played while the backward of one recorded later is to come:
    layers are recorded in their order, played forward in it and backward in the reverse.

    Attributes:
        has_told: whether somebody was told why nothing is recorded.
        has_failed: whether recording was ended by an error, after which nothing more is recorded.
        era: changes when all that was recorded before is to be recorded anew, in later forwards of the model.
        varies: whether what was recorded for one size was of too little use, so that there is to be room for others.
        round: of trials; another one whenever something is recorded, is to be, or was wrong.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None
        self._stream_beside: Any = None
        self._graphs: list[Any] = []  # of this era: torch takes from all of a stream what they share when one goes
        self._recorded_era = -1
        self._played_on: int | None = None
        self.has_told, self.has_failed, self.era, self.round = False, False, 0, Round()
        self._num_recorded = self._forwards = self._since = 0
        self._called: weakref.WeakSet[Any] = weakref.WeakSet()  # in this forward of the model
        # Those whose backward may come, in the order in which they were recorded. References: what has this has them.
        self._waiting: list[weakref.ref[Any]] = []
        self._gradients: dict[Any, Tensor] = {}
        self.varies = False
        self._capacities: dict[Extent, Capacity] = {}

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

    def renew(self, recording: Any) -> None:
        """Let all that was recorded with this one be recorded anew: by itself it would come after the others."""
        if recording.era == self.era:
            self.renew_all()

    def renew_all(self) -> None:
        """Let whatever is recorded be recorded anew, in one later forward."""
        self.era, self._since = self.era + 1, self._forwards + 1

    def may_play(self, recording: Any) -> bool:
        """Whether no recorded forward is waiting for its backward that this one would take memory from."""
        while self._waiting:
            last = self._waiting[-1]()
            if last is not None and last.is_pending:
                return last.number < recording.number
            self._waiting.pop()
        return True

    def is_read(self, sizes: AsGiven) -> bool:
        """Whether a backward may come that reads how large its call was from these."""
        return any(each.sizes is sizes for each in self._pending())

    def _pending(self) -> list[Any]:
        """What was played whose backward may come."""
        waiting = (each() for each in self._waiting)
        return [each for each in waiting if each is not None and each.is_pending]

    @property
    def may_record(self) -> bool:
        """Whether all forwards that wait for their backward are trials, which see what recording spoils."""
        return not any(each.is_alone for each in self._pending())

    def let_go(self) -> None:
        """Of graphs that nobody has any more, all at once, unless a backward may still play one of them."""
        if not self._pending():
            self._graphs.clear()
            self._gradients.clear()

    def reset(self) -> None:
        """Destroy all graphs, whoever has them, so that nothing can be played any more."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def played_forward(self, recording: Any) -> None:
        """Its backward may come now."""
        self._waiting.append(weakref.ref(recording))

    def plays_backward(self, recording: Any) -> None:
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

    def capacity(self, most: Extent, found: Given, kind: type[Capacity] = Capacity) -> Capacity:
        """Room for so much, to record a call in: the same for all, but where a backward is to come of another call."""
        known = self._capacities.get(most)
        if known is None or (self.is_read(known) and not known.holds(found)):
            known = self._capacities[most] = kind(most, self.device_type)
        return known

    def mark(self) -> Any:
        """An event of what is recorded, here: whenever that is played, what is beside it may wait for this point."""
        event = torch.cuda.Event(external=True)
        event.record()
        return event

    def compute_beside(self, products: Sequence[Product]) -> list[Tensor]:
        """What the graph that was started last leaves to be computed, while it goes on: not before operands are made,
        all of them, since rows leave only then. What needs memory of its own comes behind. The current stream waits.
        """
        current, beside = torch.cuda.current_stream(), [each for each in products if each.may_be_beside]
        outs = [torch.empty_like(each.matrices) for each in beside]  # the current stream's, as all gradients are
        if beside:
            try:
                with torch.cuda.stream(self._stream_beside):
                    for each in beside:
                        each.made.wait()
                    for each, out in zip(beside, outs, strict=True):
                        each.compute(*each.operands, out=out)
            finally:
                current.wait_stream(self._stream_beside)
        computed = iter(outs)
        return [next(computed) if each.may_be_beside else each.compute(*each.operands) for each in products]

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
            self._stream_beside = self._stream_beside or torch.cuda.Stream()
            self._recorded_era = self.era
            self._graphs.clear()
            self._gradients.clear()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What starts again all that `work` starts on the GPU; and what `work` made, whose values then change."""
        _make_room()
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


def _make_room() -> None:
    """Have torch give back what it holds and does not use, if that is more than is free: while it records, it does not,
    and fails where there is no more."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if unused > torch.cuda.mem_get_info()[0]:
        torch.cuda.empty_cache()


class _Memory:
    """Of a tensor, as bytes, for what reads `__cuda_array_interface__`."""

    def __init__(self, tensor: Tensor):
        shape, data = (tensor.numel() * tensor.element_size(),), (tensor.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "version": 3}
