"""A small checkpoint and a conversion of it, made by hand: what the tests of the engine's safety work on."""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_accel.convert.headers import make_header, num_bytes
from moe_accel.convert.regions import Copy, Layout, Output, Part, Plan, Region, Tensor
from moe_accel.convert.run import Job, Options, execute, make_job
from moe_accel.convert.source import open_checkpoint

LAYERS, EXPERTS, INNER, HIDDEN = 6, 3, 20, 36
SHARD_BYTES = 12_000


def write_file(file: Path, tensors: list[Tensor], metadata: dict[str, str] | None = None, seed: int = 0) -> None:
    """A safetensors file of noise, the same for the same names and seed."""
    header, starts = make_header({each.name: each for each in tensors}, metadata)
    by_name = {each.name: each for each in tensors}
    with open(file, "wb") as stream:
        stream.write(header)
        for name in starts:
            noise = np.random.default_rng([seed, *name.encode()])
            stream.write(noise.bytes(num_bytes(by_name[name].dtype, by_name[name].shape)))


def write_source(folder: Path) -> None:
    """A per-expert checkpoint in three files, split anywhere, with an index and what lies beside it."""
    folder.mkdir()
    tensors = [Tensor("model.embed_tokens.weight", "BF16", (50, HIDDEN)), Tensor("step", "I64", ())]
    for layer in range(LAYERS):
        tensors.append(Tensor(f"model.layers.{layer}.mlp.gate.weight", "F32", (EXPERTS, HIDDEN)))
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors += [Tensor(f"{name}.{role}_proj.weight", "BF16", (INNER, HIDDEN)) for role in ("gate", "up")]
            tensors.append(Tensor(f"{name}.down_proj.weight", "BF16", (HIDDEN, INNER)))
    random.Random(0).shuffle(tensors)
    files = {f"model-0000{at + 1}-of-00003.safetensors": tensors[at::3] for at in range(3)}
    for name, some in files.items():
        write_file(folder / name, some, {"format": "pt"})
    index = {"metadata": {"total_size": 1, "total_parameters": 7}}
    index["weight_map"] = {each.name: name for name, some in files.items() for each in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")


def matrix(tensor: str, offset: int, rows: int, cols: int, transposed: bool = False) -> Region:
    return Region(tensor, offset, rows, cols, *((1, rows) if transposed else (cols, 1)))


def stacked_plan(tensors: dict[str, Tensor]) -> tuple[Plan, list[Part], list[Part]]:
    """Gate and up stacked, down stacked and transposed; by hand, independent of the planner."""
    outputs, found, source_parts, consumed = [], [], [], set()
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        both: dict[str, list[Copy]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(EXPERTS):
            for role in ("gate", "up", "down"):
                name = f"{prefix}.{expert}.{role}_proj.weight"
                rows, cols = tensors[name].shape
                stack = "down_proj" if role == "down" else "gate_up_proj"
                at = expert * rows * cols if role == "down" else (2 * expert + (role == "up")) * rows * cols
                source = matrix(name, 0, rows, cols)
                target = matrix(f"{prefix}.{stack}", at, rows, cols, transposed=role == "down")
                both[stack].append(Copy(source, target))
                source_parts.append(Part(prefix, expert, role, source))
                found.append(Part(prefix, expert, role, target))
                consumed.add(name)
        outputs.append(
            Output(f"{prefix}.gate_up_proj", "BF16", (EXPERTS, 2 * INNER, HIDDEN), tuple(both["gate_up_proj"]))
        )
        outputs.append(Output(f"{prefix}.down_proj", "BF16", (EXPERTS, INNER, HIDDEN), tuple(both["down_proj"])))
    rest = [each for each in tensors.values() if each.name not in consumed]
    for each in rest:
        size = int(np.prod(each.shape))
        whole = Region(each.name, 0, 1, size, size, 1)
        outputs.append(Output(each.name, each.dtype, each.shape, (Copy(whole, whole),)))
    layouts = (Layout("model.layers.*.mlp", "per-expert", "stacked", EXPERTS, LAYERS),)
    return Plan(tuple(outputs), layouts, tuple(each.name for each in rest), ()), found, source_parts


def job_of(source: Path, target: Path, **options) -> Job:
    checkpoint = open_checkpoint(source)
    chosen = Options("stacked", **{"max_shard_bytes": SHARD_BYTES, "threads": 2} | options)
    plan, found, source_parts = stacked_plan(checkpoint.tensors)
    return make_job(checkpoint, target, chosen, plan, lambda: (source_parts, found))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensor_of(folder: Path, name: str) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    header, tensor = checkpoint.headers[checkpoint.file_of[name]], checkpoint.tensors[name]
    data = header.file.read_bytes()[header.starts[name] :][: num_bytes(tensor.dtype, tensor.shape)]
    return np.frombuffer(data, {"BF16": np.uint16, "F32": np.uint32, "I64": np.uint64}[tensor.dtype]).reshape(
        tensor.shape
    )


CALLS = ("replace", "fsync", "pwrite", "copy_file_range", "preadv", "unlink", "ftruncate", "mkdir")


@contextmanager
def at_call(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Do `act` when the `number`-th call to the file system begins; yields the count, in a list."""
    count, lock, real = [0], threading.Lock(), {name: getattr(os, name) for name in CALLS}

    def counted(name: str) -> Callable:
        def call(*arguments, **keywords):
            with lock:
                count[0] += 1
                now = count[0] == number
            if now:
                act()
            return real[name](*arguments, **keywords)

        return call

    try:
        for name in CALLS:
            setattr(os, name, counted(name))
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def killed_at(number: int, job: Any, execute: Callable = execute) -> int:
    """Run `job` in a process that dies by SIGKILL at a call; returns the signal it died of, 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                execute(job)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] & 0x7F


def kill_and_resume(
    make_job: Callable[[Path], Any],
    tmp_path: Path,
    reference: dict[str, bytes],
    points: int,
    seed: int,
    execute: Callable = execute,
) -> None:
    """Kill a job at random points: what is published is finished, and the same job then makes the same directory."""
    with at_call(0, lambda: None) as count:
        execute(make_job(tmp_path / "counted"))
    chooser = random.Random(seed)
    for number in chooser.sample(range(1, count[0] - 10), points):
        target = tmp_path / f"killed-{number}"
        assert killed_at(number, make_job(target), execute) == signal.SIGKILL
        check_nothing_unfinished_is_published(target, reference)
        if number % 3 == 0:  # and once more while it recovers
            killed_at(chooser.randrange(1, number), make_job(target), execute)
            check_nothing_unfinished_is_published(target, reference)
        whole = len(list(target.glob("*.safetensors")))
        report = execute(make_job(target))
        assert len(report.kept) == whole
        assert contents(target) == reference
        shutil.rmtree(target)


def check_nothing_unfinished_is_published(folder: Path, reference: dict[str, bytes]) -> None:
    for name, data in contents(folder).items() if folder.exists() else ():
        if ".tmp-" not in name and name != ".moe-accel.lock":
            assert data == reference[name], f"{name} has its final name and is not finished"
    if (folder / "model.safetensors.index.json").exists():
        open_checkpoint(folder)
