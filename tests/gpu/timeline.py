"""What a GPU does in the parts of a step over several: kernels, NCCL and nothing else, or nothing at all."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Of one kernel, or copy, on a GPU, in microseconds."""

    start: float
    duration: float
    name: str


class Standing(NamedTuple):
    """Of one part of a step, in microseconds.

    Attributes:
        whole: from its first kernel's start to its last one's end.
        kernels: in which at least one kernel ran that is not NCCL's.
        nccl_alone: in which NCCL's ran, and no other.
        idle: in which none did.
        count: kernels, all of them.
    """

    whole: float
    kernels: float
    nccl_alone: float
    idle: float
    count: int

    def __str__(self) -> str:
        return (
            f"{self.whole / 1e3:.1f} ms: kernels {self.kernels / 1e3:.1f}, NCCL's alone {self.nccl_alone / 1e3:.1f}, "
            f"idle {self.idle / 1e3:.1f}; {self.count} kernels"
        )


def standings(parts: Sequence[tuple[str, Callable[[], Any]]]) -> dict[str, Standing]:
    """Run the parts of a step, waiting for the GPU after each, and say what it did in each."""
    return {name: standing(spans_of(work)) for name, work in parts}


def spans_of(work: Callable[[], Any]) -> list[Span]:
    """What runs on this process's GPU while `work` does, and until all of it is over."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    results: Any = profiler.profiler
    on_gpu = [each for each in results.kineto_results.events() if str(each.device_type()).endswith("CUDA")]
    return [Span(each.start_ns() / 1e3, each.duration_ns() / 1e3, each.name()) for each in on_gpu]


def standing(spans: Sequence[Span]) -> Standing:
    """Of kernels in any order."""
    if not spans:
        return Standing(0.0, 0.0, 0.0, 0.0, 0)
    whole = max(each.start + each.duration for each in spans) - min(each.start for each in spans)
    kernels = _covered(each for each in spans if "nccl" not in each.name.lower())
    either = _covered(spans)
    return Standing(whole, kernels, either - kernels, whole - either, len(spans))


def _covered(spans: Iterable[Span]) -> float:
    """Time in which at least one of them runs."""
    return sum(end - start for start, end in union((each.start, each.start + each.duration) for each in spans))


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time, starts and ends, in spans that do not overlap."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
