"""What `moe-accel convert` and `inspect` print of an adapter: results on stdout, complaints on stderr."""

from pathlib import Path
from typing import Any

from moe_accel.adapters import merge as merging
from moe_accel.adapters.dialect import Found
from moe_accel.adapters.numbers import Survival
from moe_accel.adapters.run import Done, Request, convert_adapter, describe, read
from moe_accel.adapters.source import Adapter
from moe_accel.adapters.verify import compare_adapters
from moe_accel.convert.commands import (
    check_failed,
    describe_kept,
    format_size,
    interrupted,
    print_comparison,
    print_json,
    print_table,
    show_progress,
)
from moe_accel.convert.verify import MismatchError


def convert(source: Path, target: Path, request: Request, as_json: bool) -> int:
    """Convert an adapter, or say what would be done; returns the exit status."""
    done = convert_adapter(source, target, request)
    if as_json:
        print_json(_record(done))
        return 0
    _print_experts(done.found)
    for note in done.notes:
        print(f"note: {note}")
    what = "would be written" if request.dry_run else "written, read back and equal"
    print(f"{target}: --to {done.to}, {done.num_tensors} tensors, {format_size(done.num_bytes)}, {what}")
    return 0


def show(folder: Path, request: Request, as_json: bool) -> int:
    """Describe an adapter; returns the exit status."""
    adapter, model, found, _ = read(folder, request, naming=False)
    if as_json:
        record = {"command": "inspect", "adapter": True, "model_type": model.model_type, **_found_record(found)}
        print_json(record | {"config": _config_record(adapter), "bytes": adapter.header.file_bytes})
        return 0
    config = adapter.config
    scheme = " rsLoRA" if config.rslora else ""
    name = model.model_type or "an unknown model"
    print(f"LoRA adapter{scheme}, r={config.r}, alpha={config.alpha:g}, for {name} ({model.source})")
    _print_experts(found)
    for note in found.notes:
        print(f"note: {note}")
    print(f"outside of the experts: {len(found.others)} tensors")
    print(f"{adapter.header.file.name}: {len(adapter.tensors)} tensors, {format_size(adapter.header.file_bytes)}")
    return 0


def verify(first: Path, second: Path, request: Request, as_json: bool) -> int:
    """Compare two adapters; returns the exit status."""
    return print_comparison(compare_adapters(first, second, request), "factors of experts", as_json)


def _rows(found: Found) -> dict[tuple[str, ...], int]:
    """Layers that are alike, counted."""
    rows: dict[tuple[str, ...], int] = {}
    for each in found.experts:
        prefix = f"{each.layer.rpartition('.')[0]}.*.{each.block}"
        ranks = ", ".join(f"{' and '.join(f.roles)} r={f.rank} x {f.scaling:g} {f.dtype}" for f in each.factors)
        key = (prefix, str(each.num_experts), each.dialect, ranks)
        rows[key] = rows.get(key, 0) + 1
    return rows


def _print_experts(found: Found) -> None:
    rows = [
        (prefix, str(num), experts, dialect, ranks) for (prefix, experts, dialect, ranks), num in _rows(found).items()
    ]
    if not rows:
        print("no experts are adapted")
        return
    print_table("Experts", ["prefix", "layers", "experts", "dialect", "factors (rank x scaling)"], rows)
    for dialect in found.dialects:
        print(describe(dialect))


def _config_record(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    return {
        "r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "peft_version": config.raw.get("peft_version"),
    }


def _found_record(found: Found) -> dict[str, Any]:
    layers = [
        {
            "path": each.path,
            "dialect": each.dialect,
            "experts": each.num_experts,
            "factors": [
                {
                    "roles": f.roles,
                    "rank": f.rank,
                    "alpha": f.alpha,
                    "scaling": f.scaling,
                    "in_features": f.in_features,
                    "out_features": f.out_features,
                    "dtype": f.dtype,
                }
                for f in each.factors
            ],
        }
        for each in found.experts
    ]
    return {"dialects": found.dialects, "layers": layers, "others": found.others, "notes": found.notes}


def _record(done: Done) -> dict[str, Any]:
    record = _found_record(done.found) | {"notes": done.notes}
    sizes = {"tensors": done.num_tensors, "bytes": done.num_bytes, "passed_through": done.passed}
    return {
        "command": "convert",
        "adapter": True,
        "to": done.to,
        "model_type": done.model.model_type,
        **record,
        **sizes,
    }


def merge(adapter: Path, base: Path, target: Path, options: merging.Options, dry_run: bool, as_json: bool) -> int:
    """Merge an adapter into its base, or say what would be done; returns the exit status."""
    job = merging.prepare(adapter, base, target, options)
    totals = {"copy": job.num_bytes, "check": None}
    if dry_run:
        merging.check_target(job)
        print_json(_job_record(job)) if as_json else _print_job(job, target, "would be written")
        return 0
    try:
        with show_progress(totals) as progress:
            report = merging.execute(job, progress)
    except MismatchError as error:
        return check_failed(error)
    except KeyboardInterrupt:
        return interrupted()
    if as_json:
        roles = {role: merging.record_of(found) for role, found in report.roles.items()}
        done = {"roles": roles, "total": merging.record_of(report.total), "seconds": round(report.seconds, 3)}
        print_json(_job_record(job) | done | {"written": report.written, "kept": report.kept})
        return 0
    _print_survival(report)
    kept = describe_kept(report.kept)
    _print_job(job, target, f"written and read back in {report.seconds:.1f} s{kept}")
    return 0


def _job_record(job: merging.Job) -> dict[str, Any]:
    return {
        "command": "merge",
        "to": job.options.to,
        "plan_id": job.plan_id,
        "matrices": job.plan.num_factors,
        "replaced": job.plan.replaced,
        "bytes": job.num_bytes,
        "files": {shard.name: shard.file_bytes for shard in job.shards},
        "notes": job.plan.notes,
    }


def _print_job(job: merging.Job, target: Path, what: str) -> None:
    for note in dict.fromkeys(job.plan.notes):
        print(f"note: {note}")
    if job.plan.replaced:
        print(f"{len(job.plan.replaced)} tensors of the adapter (modules_to_save) replace the base's")
    num_merged = job.plan.num_factors
    print(f"{target}: {num_merged} matrices merged, {format_size(job.num_bytes)} in {len(job.shards)} files, {what}")


def _print_survival(report: merging.Report) -> None:
    def row(name: str, found: Survival) -> tuple[str, ...]:
        gain = "-" if found.gain is None else f"{found.gain:.4f}"
        return (
            name,
            str(found.num_matrices),
            gain,
            f"{100 * found.changed:.1f} %",
            str(found.num_zero),
            str(found.num_lost),
        )

    rows = [row(role, found) for role, found in sorted(report.roles.items())]
    columns = ["role", "matrices", "gain", "weights changed", "without delta", "lost to rounding"]
    print_table("What survives in the base's dtype", columns, [*rows, row("all", report.total)])
