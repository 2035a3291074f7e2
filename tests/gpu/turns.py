"""This code and that of another checkout in turns on the same GPUs: what a change is worth where the host is noisy.

usage      git worktree add FOLDER COMMIT
           python -m tests.gpu.turns FOLDER --gpus 4 --arm unwrapped [--batch 1] [--layers 24] [--turns 3] [--out FILE]
no GPU     python -m tests.gpu.turns FOLDER --gpus 2 --device cpu                     a tiny shape, over gloo
prints     a line a run; then by router, for both, the median of all steps and of each run, and how much time is left
           of the other's; exit 1 where a run failed, or losses or gradient norms of the two disagree
writes     the JSON after every run

A run is a case of `several.py` in fresh processes: steps of one run are alike, runs of the same code are less so.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.gpu import several
from tests.gpu.processes import ROOT, python_path
from tests.gpu.several_cases import ARMS, Case, allowed, largest_difference

SIZES = {"cuda": ("qwen3-30b-a3b", 4096, 24, 10, 3), "cpu": ("tiny", 32, 2, 3, 1)}
"""Shape, sequence, layers, steps and warmup, by device."""
OTHER, THIS = "other", "this"


def main() -> None:
    args = arguments()
    folders = {OTHER: args.folder.resolve(), THIS: ROOT}
    variables = {side: of_checkout(folder) for side, folder in folders.items()}
    for side, folder in folders.items():
        check(folder, variables[side])
    case = Case(args.kind, args.arm, args.gpus, args.batch, args.layers)
    end = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {"command": sys.argv[1:], "case": case.key, "runs": []}
    runs: list[dict[str, Any]] = report["runs"]
    with tempfile.TemporaryDirectory(prefix="turns_") as scratch:
        for turn in range(args.turns):
            for side in (OTHER, THIS) if turn % 2 == 0 else (THIS, OTHER):
                left = end - time.monotonic()
                if left < several.LEAST_S[args.device]:
                    print(f"no time left for turn {turn + 1} of {side}")
                    continue
                row = several.ranks(case, args, Path(scratch), min(args.limit_s, left), variables[side])
                runs.append({"side": side, "turn": turn + 1} | row)
                times = ", ".join(f"{part['routing']} {part['ms']:.1f} ms" for part in row.get("parts", ()))
                print(f"{side} {turn + 1}: {row['status']} {row.get('reason', '')} {times}", flush=True)
                if args.out is not None:
                    several.write(args.out, report)
    print("", *summary(runs), sep="\n")
    problems = wrong(runs, allowed(args.kind, args.arm, several.TOLERANCES[args.device], args.shape))
    print("\n".join(f"WRONG  {each}" for each in problems) or "nothing failed, nothing disagrees")
    sys.exit(1 if problems else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    parser.add_argument("--kind", choices=["full", "lora"], default="full")
    parser.add_argument("--arm", choices=ARMS, default="unwrapped")
    parser.add_argument("--batch", type=int, default=1, help="sequences a GPU")
    parser.add_argument("--turns", type=int, default=3, help="runs of each")
    parser.add_argument("--minutes", type=float, default=9.0, help="no run goes on past this")
    parser.add_argument("--limit-s", type=float, default=120, help="of one run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=SIZES, default="cuda")
    names = ("shape", "sequence", "layers", "steps", "warmup")
    for name in names:
        parser.add_argument(f"--{name}", type=str if name == "shape" else int)
    args = parser.parse_args()
    for name, usual in zip(names, SIZES[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, usual)
    args.newer = None
    if not (args.folder / "moe_accel").is_dir():
        parser.error(f"{args.folder} is no checkout: it has no moe_accel")
    return args


def of_checkout(folder: Path) -> dict[str, str]:
    """Variables by which a rank computes with a checkout's code, wherever it is started."""
    return {"PYTHONPATH": python_path(folder), "PYTHONSAFEPATH": "1"}


def check(folder: Path, variables: Mapping[str, str]) -> None:
    """Stop where Python would take the code from elsewhere."""
    names = "moe_accel", "tests.gpu.several_main"
    code = f"from importlib.util import find_spec; [print(find_spec(name).origin) for name in {names}]"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | dict(variables), capture_output=True, text=True, check=False
    )
    origins = [Path(line).resolve() for line in found.stdout.splitlines()]
    if len(origins) != len(names) or not all(each.is_relative_to(folder) for each in origins):
        sys.exit(f"{' and '.join(names)} do not come from {folder}: {found.stdout or found.stderr}")


def summary(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of a table."""
    lines = ["| router | of | median of all steps, ms | of each run | of the other's |", "|---|---|---|---|---|"]
    for routing in dict.fromkeys(part["routing"] for run in runs for part in run.get("parts", ())):
        steps: dict[str, list[list[float]]] = {OTHER: [], THIS: []}
        for run in runs:
            steps[run["side"]] += [part["all_ms"] for part in run.get("parts", ()) if part["routing"] == routing]
        medians = {side: statistics.median(itertools.chain(*found)) for side, found in steps.items() if found}
        for side, median in medians.items():
            each = ", ".join(f"{statistics.median(found):.1f}" for found in steps[side])
            of_other = f"{median / medians[OTHER]:.3f}" if OTHER in medians else "-"
            lines.append(f"| {routing} | {side} | {median:.1f} | {each} | {of_other} |")
    return lines


def wrong(runs: list[dict[str, Any]], tolerances: tuple[float, float]) -> list[str]:
    """What failed, and where this code's first run disagrees with the other's."""
    found = [f"{run['side']} {run['turn']}: {run.get('reason', '')}" for run in runs if run["status"] != "ok"]
    first = {side: next((run for run in runs if run["side"] == side), {}) for side in (OTHER, THIS)}
    for ours, theirs in zip(*(first[side].get("parts", ()) for side in (THIS, OTHER)), strict=False):
        for name, most in zip(("losses", "norms"), tolerances, strict=True):
            difference = largest_difference(ours[name], theirs[name])
            if difference is None or not difference <= most:
                found.append(f"{ours['routing']}: {name} differ by {difference}")
    return found


if __name__ == "__main__":
    main()
