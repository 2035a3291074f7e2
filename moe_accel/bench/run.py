"""Every case with every arm, one process after the other; this process imports no torch."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_accel
from moe_accel.bench.options import Case, Options
from moe_accel.bench.shapes import SHAPES
from moe_accel.config import ENV_VAR
from moe_accel.errors import ConfigError
from moe_accel.version import VERSION

SCHEMA = 1
"""Of the report; goes up when a name in it changes its meaning or disappears."""
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "liger-kernel")
SHOWN_LINES = 15
"""Of what a process said before it died."""

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def run(
    options: Options, say: Say | None = None, command: str | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Measure what `options` ask for, and return the report: JSON-ready, `schema` says which form.

    Args:
        options: see `Options`.
        say: called with a line of progress; None: nobody is told.
        command: what to write down as the command; None: this process's own.
        keep: called with the report so far after every row, for who may be killed before the end.

    Raises:
        ConfigError: the options break a rule, or ask for a GPU where there is none.
    """
    options.check()
    if options.device == "cuda" and not _has_gpu():
        raise ConfigError("device=cuda, but this torch sees no CUDA GPU", "moe-accel doctor says why; --device cpu")
    say = say or (lambda line: None)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command or " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"moe_accel": VERSION} | {name: _version(name) for name in PACKAGES},
        "options": asdict(options),
        "shapes": {name: _described(name) for name in dict.fromkeys(options.shapes)},
        "about": None,
        "ceilings": [],
        "rows": [],
        "per_layer": [],
        "ok": False,
        "complete": False,
    }
    with tempfile.TemporaryDirectory(prefix="moe_accel_bench_") as folder:
        runner = _Runner(options, Path(folder), say)
        for case in options.cases():
            if not any(_is_of(each, case) for each in report["ceilings"]):
                found = runner.start(case, "ceilings", case.batch)
                report["about"] = found.pop("about", report["about"])
                report["ceilings"].append({"shape": case.shape, "tokens": case.tokens} | found)
            ceiling = next(each for each in report["ceilings"] if _is_of(each, case))
            for row in runner.rows(case):
                report["about"] = row.pop("about", None) or report["about"]
                report["rows"].append(row | _shares(row, ceiling))
                report["per_layer"] = per_layer(report["rows"])
                if keep is not None:
                    keep(report)
    report["ok"] = all("median_ms" in row for row in report["rows"])
    report["complete"] = True
    return report


def _is_of(ceiling: dict[str, Any], case: Case) -> bool:
    return (ceiling["shape"], ceiling["tokens"]) == (case.shape, case.tokens)


class _Runner:
    """Starts the processes of one report."""

    def __init__(self, options: Options, folder: Path, say: Say):
        self.options, self.folder, self.say = options, folder, say
        self.count = 0

    def rows(self, case: Case) -> Iterator[dict[str, Any]]:
        """One row an arm; native runs first, timed or not, since the others are compared with it."""
        arms = self.options.all_arms()
        reference = self.folder / "reference.pt"
        reference.unlink(missing_ok=True)
        native, batch = self.start(case, "native", case.batch, time="native" in arms), case.batch
        if "native" in arms:
            yield _row(case, "native", native)
        if not reference.exists() and batch > 1:  # it did not fit: compare one sequence
            batch = 1
            self.start(case, "native", batch, time=False)
        for arm in arms:
            if arm != "native" and reference.exists():
                yield _row(case, arm, self.start(case, arm, batch))
            elif arm != "native":
                yield _row(case, arm, {"error": f"no reference to compare with: {native.get('error')}"})

    def start(self, case: Case, arm: str, check_batch: int, time: bool = True) -> dict[str, Any]:
        """Run one process; returns what it measured, or its `error`."""
        options, self.count = self.options, self.count + 1
        result, log = self.folder / f"{self.count}.json", self.folder / f"{self.count}.log"
        job = {
            "case": asdict(case),
            "arm": arm,
            "result": str(result),
            "reference": str(self.folder / "reference.pt"),
            "check_batch": check_batch,
            "time": time,
            **{name: getattr(options, name) for name in ("device", "dtype", "steps", "warmup", "rank")},
            **{name: getattr(options, name) for name in ("checkpointing", "kernels", "peer_module")},
        }
        path = self.folder / f"{self.count}.job"
        path.write_text(json.dumps(job))
        self.say(f"{case.suite} {case.shape} {case.routing}, {case.layers} layers, {case.tokens} tokens: {arm}")
        failed = _wait(path, log, options.timeout_s)
        if failed is None and not result.exists():
            failed = "it ended without a result"
        found: dict[str, Any] = {"error": failed} if failed is not None else json.loads(result.read_text())
        if not found.get("check", {}).get("ok", True):
            found["error"] = "disagrees with transformers: " + "; ".join(found["check"]["problems"][:3])
        elif "error" in found:
            found["log"] = _last_lines(log)
        if "error" in found:
            self.say(f"  {found['error']}")
        return found


def _wait(job: Path, log: Path, timeout_s: float) -> str | None:
    """Run the worker to its end; returns what went wrong, None where nothing did."""
    root = str(Path(moe_accel.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # native means native, and an Accelerator reads what a launcher left in the environment
    foreign = (ENV_VAR, "ACCELERATE_", "FSDP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_accel.bench.worker", str(job)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"not ready after {timeout_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit {status}: {(_last_lines(log) or ['nothing said'])[-1]}" if status else None


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:500] for line in lines if line.strip()][-SHOWN_LINES:]


def _row(case: Case, arm: str, found: dict[str, Any]) -> dict[str, Any]:
    return {**asdict(case), "batch": case.batch, "arm": arm} | found


def _shares(row: dict[str, Any], ceiling: dict[str, Any]) -> dict[str, float]:
    """The rate of a row as a share of each ceiling; that of the matmul is its model FLOPs utilisation (MFU)."""
    most = {name: ceiling.get(f"{name}_tflop_s") for name in ("matmul", "grouped_mm")}
    return {f"of_{name}": round(row["tflop_s"] / rate, 4) for name, rate in most.items() if rate and "tflop_s" in row}


def per_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ms of one more layer, by the difference of neighbouring depths of the same arm on the same case."""
    same = ("suite", "shape", "routing", "tokens", "seq_len", "arm")
    found = []
    timed = [row for row in rows if "median_ms" in row]
    for row in timed:
        deeper = [
            other
            for other in timed
            if all(row[name] == other[name] for name in same) and other["layers"] > row["layers"]
        ]
        if deeper:
            other = min(deeper, key=lambda each: each["layers"])
            layers = other["layers"] - row["layers"]
            ms = (other["median_ms"] - row["median_ms"]) / layers
            of = {name: row[name] for name in same}
            found.append(of | {"layers": [row["layers"], other["layers"]], "ms_per_layer": round(ms, 4)})
    return found


def _described(name: str) -> dict[str, Any]:
    shape = SHAPES[name]
    return {"model": shape.released or None, "layers": shape.released_layers, "note": shape.note or None}


def _has_gpu() -> bool:
    """Asked in a process of its own: this one imports no torch."""
    asked = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], capture_output=True, check=False).returncode == 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
