"""Everything that is measured on several GPUs of one host, prepared so that ten minutes are enough. Resumable.

usage      python -m tests.gpu.several --gpus 2 --minutes 9 --out two.json [--arms ...] [--kinds ...] [--newer FOLDER]
no GPU     python -m tests.gpu.several --gpus 2 --device cpu --minutes 8 --out try.json       a tiny shape, over gloo
prints     a line a case, then tables; exit 1 where a case failed or disagrees
writes     the JSON after every case. Called again, it goes on where it was: cases that ran (to their end, out of memory
           or of time) are left alone, those that were skipped are tried again, and with --retry those that failed.

Each case is a set of fresh processes; `several_cases.py` says which, in which order, and what is compared with what.
Full fine-tuning and LoRA (r = 16 on attention and all experts) of Qwen3-30B-A3B's shapes, or those of `--shape`, with
random weights in bf16, fused AdamW, no checkpointing: one sequence of 4096 tokens a GPU with 6 layers a GPU, four with
4 layers (what stock transformers fits into 80 GB), and four with 6 layers a GPU. Each with the model's own router, and
then with a balanced one; the optimizer is timed apart. Ragged: four sequences share 4096 tokens, of which 45 % are
padding, in every step others. `--newer` is a folder with a newer transformers: `pip install --no-deps --target FOLDER`.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.gpu.load import drop_cache
from tests.gpu.processes import FSDP2, LOSS_TOLERANCE, NORM_TOLERANCE, python_path, run_ranks
from tests.gpu.several_cases import ARMS, DEEPEP, KINDS, NEWER, UNWRAPPED, Case, judge, plan, tables, wrong

SCHEMA = 1
LEAST_S = {"cuda": 30, "cpu": 20}
"""No case starts with less time left: imports, NCCL and the model take as long."""
TOLERANCES = {"cuda": (LOSS_TOLERANCE, NORM_TOLERANCE), "cpu": (1e-5, 1e-4)}
"""By device: bf16 on a GPU, fp32 on the CPU, of a loss and of a gradient norm."""
NATIVE_EP_SINCE = (5, 19)
SAYS_WHY = ("out of memory", "skipped", "failed")
EMPTY: Mapping[str, str] = {}
SETTINGS = ("gpus", "device", "shape", "sequence", "warmup", "steps")
"""What must not change between calls that fill one file."""


def main() -> None:
    args = arguments()
    state = read(args)
    rows: dict[str, dict[str, Any]] = state["rows"]
    end = time.monotonic() + 60 * args.minutes
    scratch = Path(tempfile.mkdtemp(prefix="several_", dir=args.scratch))
    left_out: list[str] = []
    try:
        for case in wanted(args):
            if done(rows.get(case.key), args.retry):
                continue
            if end - time.monotonic() < LEAST_S[args.device]:
                left_out.append(case.key)
                continue
            row = run(case, args, scratch, end)
            if row is None:
                left_out.append(case.key)
                continue
            rows[case.key] = row
            judge(rows, TOLERANCES[args.device], args.shape)
            write(args.out, state)
            print(f"{case.key}: {row['status']} {row.get('reason', '')} ({row['seconds']} s)", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    judge(rows, TOLERANCES[args.device], args.shape)
    print("", *tables(rows), sep="\n")
    if left_out:
        print(f"no time left for {len(left_out)} cases, call again: {', '.join(left_out)}")
    problems = wrong(rows)
    print("\n".join(f"WRONG  {each}" for each in problems) or "nothing failed, nothing disagrees", flush=True)
    sys.exit(1 if problems else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    parser.add_argument("--out", type=Path, required=True, help="JSON: read if it is there, written after every case")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case runs on past this; 0 shows what is there")
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--match", default="*", help="only cases of such a name (--list), like 'full-*-8gpus-1seq-*'")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", help="of moe-accel bench; qwen3-30b-a3b, on the CPU tiny")
    parser.add_argument("--layers", type=int, help="with one sequence a GPU; 6 a GPU, at most 48")
    parser.add_argument("--shallow", type=int, help="layers with four sequences a GPU; 4")
    parser.add_argument("--load-layers", type=int, help="of the checkpoint that is loaded, 1.27 GB each; as --layers")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence; 4096")
    parser.add_argument("--steps", type=int, help="that are timed; 10. Those of a parity training, too")
    parser.add_argument(
        "--warmup",
        type=int,
        help="steps before them; 5, of which graphs need four, and one more for those that are recorded anew",
    )
    parser.add_argument("--limit-s", type=float, default=120, help="of one case; loading may take three times as long")
    parser.add_argument(
        "--newer", type=Path, help="folder with a newer transformers, for the arms stock_newer, native_ep"
    )
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is written and removed; the system's")
    parser.add_argument("--retry", action="store_true", help="run cases again that failed or took too long")
    parser.add_argument("--list", action="store_true", help="print the cases in their order, and run none")
    args = parser.parse_args()
    if args.gpus < 2:
        parser.error(f"--gpus {args.gpus} must be 2 or more: one GPU is what moe-accel bench measures")
    small = args.device == "cpu"
    deep = min(6 * args.gpus, 48)
    defaults = {"shape": "tiny", "layers": 2, "shallow": 1, "sequence": 32, "steps": 3, "warmup": 1}
    usual = {"shape": "qwen3-30b-a3b", "layers": deep, "shallow": 4, "sequence": 4096, "steps": 10, "warmup": 5}
    for name, value in (defaults if small else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.load_layers = args.load_layers or args.layers
    if args.list:
        print(*(case.key for case in wanted(args)), sep="\n")
        sys.exit(0)
    return args


def wanted(args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for. A comparison needs its other side: ask for both."""
    cases = plan(args.gpus, args.layers, args.shallow, args.load_layers)
    cases = [case for case in cases if case.arm in args.arms and case.kind in args.kinds]
    return [case for case in cases if fnmatchcase(case.key, args.match)]


def read(args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call left, or an empty report."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not args.out.exists():
        return {"schema": SCHEMA, "commands": [this_call()], "settings": settings, "rows": {}}
    state = json.loads(args.out.read_text())
    if state.get("settings") != settings:
        sys.exit(f"{args.out} is of {state.get('settings')}, and this call of {settings}: choose another --out")
    state["commands"].append(this_call())
    return state


def this_call() -> str:
    """As it was asked for."""
    return shlex.join(["python", "-m", "tests.gpu.several", *sys.argv[1:]])


def done(row: dict[str, Any] | None, retry: bool) -> bool:
    """Whether a case of the file stays as it is."""
    if row is None or row["status"] == "skipped":
        return False
    return not (retry and row["status"] in ("failed", "out of time"))


def write(file: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    part.replace(file)


def run(case: Case, args: argparse.Namespace, scratch: Path, end: float) -> dict[str, Any] | None:
    """Run a case; None where it was cut off by the end of the call and not by its own limit."""
    row = asdict(case) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    reason = cannot(case, args)
    if reason is not None:
        return row | {"status": "skipped", "reason": reason, "seconds": 0}
    checkpoint = scratch / "checkpoint"
    if case.kind == "load":
        shutil.rmtree(scratch / "saved", ignore_errors=True)
        if not (checkpoint / "model.safetensors.index.json").exists():
            writing = Case("write", "one", 1, 0, case.layers)
            found = ranks(writing, args, scratch, end - time.monotonic())
            if found["status"] == "out of time":
                return None
            if found["status"] != "ok":
                return row | found
        needed = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) * case.gpus
        if case.arm == "stock" and needed > 0.7 * host_bytes():
            reason = f"{needed / 1e9:.0f} GB of host memory, the model once a rank"
            return row | {"status": "skipped", "reason": reason, "seconds": 0}
        drop_cache(checkpoint)
    own = args.limit_s * (3 if case.kind == "load" else 1)
    left = end - time.monotonic()
    found = ranks(case, args, scratch, min(own, left))
    return None if found["status"] == "out of time" and left < own and not found.get("parts") else row | found


def cannot(case: Case, args: argparse.Namespace) -> str | None:
    """Why an arm cannot be had, as far as that shows without a rank."""
    if case.arm in DEEPEP and importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep is not installed"
    if case.arm == "stock_newer" and args.newer is None:
        return "needs a newer transformers: --newer FOLDER"
    if case.arm in NEWER and args.newer is not None and not (args.newer / "transformers").is_dir():
        return f"no transformers in {args.newer}"
    if case.arm == "native_ep" and args.newer is None:
        installed = metadata.version("transformers")
        if tuple(map(int, installed.split(".")[:2])) < NATIVE_EP_SINCE:
            return f"transformers {installed} has no all-to-all expert parallelism (5.19 has): --newer FOLDER"
    if case.arm == "native_ep" and case.kind == "lora":
        return "PEFT cannot adapt experts that transformers has spread (mixed torch.Tensor and DTensor)"
    return None


def host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ranks(
    case: Case, args: argparse.Namespace, scratch: Path, limit_s: float, more: Mapping[str, str] = EMPTY
) -> dict[str, Any]:
    """Start the ranks, with `more` variables, and put together what they wrote."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job = Path(folder, "job.json")
        names = ("shape", "sequence", "warmup", "steps", "device")
        how = {name: getattr(args, name) for name in names}
        job.write_text(json.dumps(asdict(case) | how | {"folder": folder, "checkpoint": str(scratch / "checkpoint")}))
        command = [sys.executable, "-m", "tests.gpu.several_main", str(job)]
        ended = run_ranks(command, case.num_ranks, environment(case, args) | dict(more), Path(folder), limit_s)
        files = [Path(folder, f"{rank}.json") for rank in range(case.num_ranks)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    result = dict(found[0]) | {"seconds": ended.seconds}
    broken = [rank for rank, each in enumerate(found) if each.get("status") not in (None, "ok")]
    unheard = [rank for rank, each in enumerate(found) if "status" not in each]
    if broken:  # the one that says why, before those that waited for it
        first = min(broken, key=lambda rank: SAYS_WHY.index(found[rank]["status"]))
        result |= {name: found[first][name] for name in ("status", "reason")}
    elif unheard and all(ended.codes[rank] is None for rank in unheard):
        first, result = unheard[0], result | {"status": "out of time", "reason": f"not ready after {limit_s:.0f} s"}
    elif unheard:
        first = next(rank for rank in unheard if ended.codes[rank] is not None)
        result |= {"status": "failed", "reason": f"rank {first} ended with {ended.codes[first]} and said nothing"}
    else:
        return result
    if result["status"] != "skipped":
        result["log"] = ended.outputs[first].splitlines()[-25:]
    return result


def environment(case: Case, args: argparse.Namespace) -> dict[str, str]:
    """Variables of a case's ranks."""
    newer = [args.newer.resolve()] if case.arm in NEWER and args.newer is not None else []
    found = {"PYTHONPATH": python_path(*newer), "PYTHONUNBUFFERED": "1"}
    found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if args.device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if case.num_ranks > 1 and case.arm != "native_ep":
        found |= FSDP2
    if case.arm == "gathered":
        found["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    if case.arm in UNWRAPPED:
        found["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"
    if case.arm == "compiled":
        found |= {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
    if case.arm == "stock_ram":
        found["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    if case.arm in DEEPEP:
        found |= {"MOE_ACCEL_DEEPEP": DEEPEP[case.arm], "EP_SUPPRESS_NCCL_CHECK": "1"}
    return found


if __name__ == "__main__":
    main()
