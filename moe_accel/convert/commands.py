"""What `moe-accel convert`, `verify` and `inspect` print: results on stdout, progress and complaints on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_accel.convert import run
from moe_accel.convert.inspect import Contents, inspect
from moe_accel.convert.verify import Comparison, MismatchError, compare
from moe_accel.convert.work import Progress, silent

SCHEMA = 1
SHOWN = 10
"""Lines shown of a list that can be long; `--json` has all of it."""
WIDE = 400
"""Columns of a table that is not printed on a terminal."""
EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 1, 130


def convert(source: Path, target: Path, options: run.Options, dry_run: bool, as_json: bool) -> int:
    """Convert, or say what would be done; returns the exit status."""
    job = run.prepare(source, target, options)
    if lossy := job.dequantization:
        stored = "; ".join(f"{count} weights {scheme}" for scheme, count in lossy.schemes.items())
        print(f"lossy: --dequantize bf16 rounds value x scale to bf16 ({stored}); scales are dropped", file=sys.stderr)
    if dry_run:
        run.check_target(job)
        print_json(_job_record(job)) if as_json else _print_job(job)
        return 0
    try:
        totals = {"copy": job.num_bytes} | ({"check": 2 * job.num_bytes} if options.verify == "full" else {})
        totals = ({"dequantize": lossy.num_bytes} if lossy else {}) | totals
        with show_progress(totals) as progress:
            report = run.execute(job, progress)
    except MismatchError as error:
        return check_failed(error)
    except KeyboardInterrupt:
        return interrupted()
    if as_json:
        done = {"seconds": round(report.seconds, 3), "written": report.written, "kept": report.kept}
        print_json(_job_record(job) | done | {"digests": report.num_digests})
        return 0
    _print_job(job)
    kept = describe_kept(report.kept)
    checked = f"{report.num_digests} digests equal" if options.verify == "full" else f"checked: {options.verify}"
    rate = format_size(job.num_bytes / max(report.seconds, 1e-9))
    print(f"{target}: {len(job.shards)} files{kept}, {checked}, {report.seconds:.1f} s, {rate}/s")
    return 0


def verify(first: Path, second: Path, family: Path | None, threads: int | None, as_json: bool) -> int:
    """Compare two checkpoints; returns the exit status."""
    try:
        with show_progress({"check": None}) as progress:
            found = compare(first, second, family, threads, progress)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return print_comparison(found, "expert matrices", as_json)


def print_comparison(found: Comparison, what: str, as_json: bool) -> int:
    """Say what was equal or different; returns the exit status. `what` the parts of experts are called."""
    if as_json:
        record = {"equal": not found.differences, "experts": found.num_parts, "tensors": found.num_tensors}
        print_json({"command": "verify", **record, "bytes": found.num_bytes, "differences": found.differences})
    elif not found.differences:
        size = format_size(found.num_bytes)
        print(f"equal: {found.num_parts} {what}, {found.num_tensors} other tensors, {size}")
    else:
        print(f"different in {len(found.differences)} places")
        print_some(found.differences)
    return EXIT_CHECK_FAILED if found.differences else 0


def show(folder: Path, family: Path | None, as_json: bool) -> int:
    """Describe a checkpoint; returns the exit status."""
    found = inspect(folder, family)
    print_json(_contents_record(found)) if as_json else _print_contents(found)
    return 0


def describe_kept(kept: tuple[str, ...]) -> str:
    """Goes behind the number of files."""
    return f", {len(kept)} of them whole from an earlier run" if kept else ""


def interrupted() -> int:
    """Say how to go on; returns the exit status."""
    print("interrupted: no unfinished file has its final name, and there is no index", file=sys.stderr)
    print("hint: run the same command again to go on", file=sys.stderr)
    return EXIT_INTERRUPTED


def check_failed(error: MismatchError) -> int:
    """Say what differs; returns the exit status."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return EXIT_CHECK_FAILED


def print_json(record: dict[str, Any]) -> None:
    """A record with its schema on stdout."""
    print(json.dumps({"schema": SCHEMA, **record}, indent=2))


def print_some(lines: tuple[str, ...], indent: str = "  ") -> None:
    """The first lines of a list."""
    for line in lines[:SHOWN]:
        print(indent + line)
    if len(lines) > SHOWN:
        print(f"{indent}and {len(lines) - SHOWN} more; --json lists all")


def format_size(num_bytes: float) -> str:
    """12.34 MB for 12,340,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def print_table(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("layers", "experts", "size") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else WIDE  # in a file, a name stays in one piece
    Console(markup=False, highlight=False, width=width).print(table)


def _job_record(job: run.Job) -> dict[str, Any]:
    return {
        "command": "convert",
        "to": job.options.to,
        "plan_id": job.plan_id,
        "bytes": job.num_bytes,
        "layouts": [
            {
                "prefix": each.prefix,
                "source": each.source,
                "target": each.target,
                "layers": each.num_layers,
                "experts": each.num_experts,
            }
            for each in job.plan.layouts
        ],
        "files": {shard.name: shard.file_bytes for shard in job.shards},
        "tensors": len(job.plan.outputs),
        "passed_through": job.plan.passed_through,
        "copied_files": job.checkpoint.others,
        "left_out": job.checkpoint.left_out,
        "notes": job.plan.notes,
    } | ({"dequantized": job.dequantization.record} if job.dequantization else {})


def _print_job(job: run.Job) -> None:
    rows = [
        (each.prefix, str(each.num_layers), str(each.num_experts), each.source, each.target)
        for each in job.plan.layouts
    ]
    print_table("Experts", ["prefix", "layers", "experts", "from", "to"], rows)
    print(
        f"{len(job.plan.outputs)} tensors, {format_size(job.num_bytes)} in {len(job.shards)} files; "
        f"{len(job.plan.passed_through)} tensors pass through unchanged (--json lists them), "
        f"{len(job.checkpoint.others)} other files go along"
    )
    if lossy := job.dequantization:
        for scheme, count in lossy.schemes.items():
            print(f"lossy: {count} weights dequantised to bf16 from {scheme}")
        print(f"{format_size(lossy.num_bytes)} of bf16 weights lie beside the target until it is whole")
    for note in job.plan.notes:
        print(f"note: {note}")
    if job.checkpoint.left_out:
        print("not taken along, in formats that are not read:")
        print_some(job.checkpoint.left_out)


def _contents_record(found: Contents) -> dict[str, Any]:
    return {
        "command": "inspect",
        "model_type": found.checkpoint.model_type,
        "experts": [
            {
                "prefix": each.prefix,
                "layers": each.num_layers,
                "experts": each.num_experts,
                "stored": each.stored,
                "roles": each.roles,
                "bytes": each.num_bytes,
            }
            for each in found.experts
        ],
        "dtypes": found.dtypes,
        "tensors": len(found.checkpoint.tensors),
        "other_tensors": found.num_other_tensors,
        "other_bytes": found.other_bytes,
        "files": found.file_bytes,
    }


def _print_contents(found: Contents) -> None:
    print(f"{found.checkpoint.folder}  model_type {found.checkpoint.model_type or 'unknown'}")
    rows = [
        (x.prefix, str(x.num_layers), str(x.num_experts), x.stored, "\n".join(x.roles), format_size(x.num_bytes))
        for x in found.experts
    ]
    if rows:
        print_table("Experts", ["prefix", "layers", "experts", "stored", "matrices", "size"], rows)
    else:
        print("no experts in a layout that is known")
    print(f"{found.num_other_tensors} other tensors, {format_size(found.other_bytes)}")
    print("dtypes: " + ", ".join(f"{dtype} {format_size(size)}" for dtype, size in found.dtypes.items()))
    sizes = tuple(f"{name}  {format_size(size)}" for name, size in found.file_bytes.items())
    print(f"{len(sizes)} files, {format_size(sum(found.file_bytes.values()))}")
    print_some(sizes)


@contextmanager
def show_progress(totals: Mapping[str, int | None]) -> Iterator[Progress]:
    """A bar a stage on stderr, with rate and time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks = {kind: bars.add_task(kind, total=total) for kind, total in totals.items()}
        yield _advance(bars.advance, tasks)


def _advance(advance: Callable[..., None], tasks: dict[str, Any]) -> Progress:
    def told(kind: str, num_bytes: int) -> None:
        if kind in tasks:
            advance(tasks[kind], num_bytes)

    return told
