"""Where the host's time goes in a training step over several GPUs: what small batches wait for.

usage      python -m tests.gpu.host [--gpus 2] [--cases full-alltoall lora-alltoall] [--layers 12] [--out FOLDER]
no GPU     python -m tests.gpu.host --device cpu                a tiny shape, over gloo
prints     for each case the milliseconds of a step, and the host's of forward, backward and optimizer and its wait for
           the GPU at the end: medians of 10 steps, as `moe-accel` starts kernels and as Triton does; forward's by rank;
           the lines of Python the time was in (one stack a millisecond, of rank 0, backward in the same thread); and
           what each rank's GPU does in forward and backward (`timeline.py`), under the profiler and one after the other
writes     FOLDER/host_CASE.txt: those lines with their callers, cProfile's tables; FOLDER/ops_CASE.txt: torch's
           operations and the GPU's kernels

A case is a kind and an arm of `several.py`: Qwen3-30B-A3B's shapes, one sequence of 4096 tokens a GPU, or ragged ones.
"""

import argparse
import collections
import cProfile
import io
import itertools
import json
import os
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu.processes import run_ranks
from tests.gpu.several import environment
from tests.gpu.several_cases import Case

SIZES = {"cuda": ("qwen3-30b-a3b", 4096, 12), "cpu": ("tiny", 32, 2)}
"""Shape, sequence and layers, by device."""
LIMIT_S = 150
EVERY_S = 0.0007  # with the time a sample takes, a millisecond
WARMUP, STEPS = 4, 10
MOST_LINES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=["full-alltoall", "lora-alltoall"])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape, sequence, layers = SIZES[args.device]
    failed, args.newer = False, None
    for case in args.cases:
        kind, arm = case.split("-")
        measured = Case(kind, arm, args.gpus, 4 if kind == "ragged" else 1, args.layers or layers)
        job = asdict(measured)
        job |= {"shape": shape, "sequence": sequence, "warmup": WARMUP, "steps": STEPS, "device": args.device}
        job |= {"folder": str(args.out.resolve()), "checkpoint": ""}
        command = [sys.executable, "-c", f"from tests.gpu import host; host.rank({json.dumps(job)!r})"]
        with tempfile.TemporaryDirectory() as folder:
            ended = run_ranks(command, args.gpus, environment(measured, args), Path(folder), LIMIT_S)
        wrong = [at for at, code in enumerate(ended.codes) if code != 0]
        failed |= bool(wrong)
        print(f"{case} ({ended.seconds} s)", ended.outputs[wrong[0] if wrong else 0], sep="\n", flush=True)
    sys.exit(failed)


# ---- a rank


def rank(given: str) -> None:
    """One rank of a case."""
    import torch

    from moe_accel.kernels import device as kernels
    from tests.gpu import several_rank, timeline

    job = several_rank.Job(**json.loads(given))
    device, is_main = several_rank.own_device(job), os.environ.get("RANK", "0") == "0"
    _, model = several_rank.build(job, device)
    model, optimizer, _ = several_rank.spread(job, model)
    own, vocabulary = int(os.environ.get("RANK", "0")), model.config.vocab_size
    batches = [several_rank.batch_of(own, number, job, vocabulary, device) for number in several_rank.steps_of(job)]
    of_steps = itertools.cycle(batches)

    def forward() -> torch.Tensor:
        return model(**next(of_steps)).loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> list[float]:
        """Milliseconds: all of it, forward, backward, optimizer, and waiting at the end."""
        marks = [time.perf_counter()]
        loss = forward()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        update()
        marks.append(time.perf_counter())
        several_rank.synchronize(device)
        marks.append(time.perf_counter())
        parts = [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
        return [sum(parts), *parts]

    times = []

    def timed(name: str) -> None:
        several_rank.gathered(None)
        found = [step() for _ in range(job.steps)]
        medians = ", ".join(f"{statistics.median(each):.1f}" for each in zip(*found, strict=True))
        whole = [each[0] for each in found]
        forwards = several_rank.gathered(round(statistics.median(each[1] for each in found), 1))
        steps = f"steps of {min(whole):.1f} to {max(whole):.1f}"
        times.append(f"{name}: {medians} ms ({steps}; forward by rank: {', '.join(map(str, forwards))})")
        if is_main:
            print(times[-1], flush=True)

    for _ in range(several_rank.untimed_and_timed(job)[0]):
        step()
    if is_main:
        print("a step, its forward, backward, optimizer, wait for the GPU")
    timed("as it is")
    if kernels.LAUNCHES_COMPILED:
        kernels.LAUNCHES_COMPILED = False
        timed("started by Triton")
        kernels.LAUNCHES_COMPILED = True
    timed("as it is")
    if device.type == "cuda":
        kept: list[torch.Tensor] = []
        parts = ("forward", lambda: kept.append(forward())), ("backward", lambda: kept.pop().backward())
        by_rank = several_rank.gathered(timeline.standings(parts))
        update()
        of_gpus = [f"rank {at} {name}: {each}" for at, found in enumerate(by_rank) for name, each in found.items()]
        times += of_gpus
        if is_main:
            print(*of_gpus, sep="\n", flush=True)
    torch.autograd.set_multithreading_enabled(False)
    step()
    name = f"{job.kind}_{job.arm}.txt"
    for file, written in (("host", python_lines(step)), ("ops", operations(step, device))):
        if is_main:
            Path(job.folder, f"{file}_{name}").write_text("\n".join([*times, "", written]))
    several_rank.gathered(None)
    sys.stdout.flush()
    os._exit(0)  # exit handlers wait for ranks that may be gone


def python_lines(step: Callable[[], Any]) -> str:
    """In which lines of Python the time of some steps is; prints the first of them on rank 0."""
    lines: collections.Counter[str] = collections.Counter()
    stacks: collections.Counter[str] = collections.Counter()
    with sampled(lines, stacks):
        for _ in range(8):
            step()
    total = max(1, sum(lines.values()))
    written = io.StringIO()
    for counted in (lines, stacks):
        written.writelines(f"{100 * number / total:5.1f} % {of}\n" for of, number in counted.most_common(MOST_LINES))
        written.write("\n")
    if os.environ.get("RANK", "0") == "0":
        print(*written.getvalue().splitlines()[:12], sep="\n", flush=True)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(3):
        step()
    profiler.disable()
    for order in ("tottime", "cumtime"):
        pstats.Stats(profiler, stream=written).sort_stats(order).print_stats(MOST_LINES)
    return written.getvalue()


@contextmanager
def sampled(lines: collections.Counter[str], stacks: collections.Counter[str]) -> Any:
    """Look at this thread's stack every millisecond."""
    own, ended, before = threading.get_ident(), threading.Event(), sys.getswitchinterval()

    def sample() -> None:
        while not ended.wait(EVERY_S):
            frame, seen = sys._current_frames().get(own), []
            while frame is not None and len(seen) < 4:
                code = frame.f_code
                seen.append(f"{'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno} {code.co_name}")
                frame = frame.f_back
            lines[seen[0]] += 1
            stacks[" < ".join(seen)] += 1

    thread = threading.Thread(target=sample, daemon=True)
    sys.setswitchinterval(1e-4)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def operations(step: Callable[[], Any], device: Any) -> str:
    """torch's operations of two steps by the host's time, and what ran on the GPU by its own."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        step()
    found = profiler.key_averages()
    orders = ["self_cpu_time_total", *(["self_cuda_time_total"] if on_gpu else [])]
    return "\n".join(found.table(sort_by=each, row_limit=MOST_LINES, max_name_column_width=80) for each in orders)


if __name__ == "__main__":
    main()
