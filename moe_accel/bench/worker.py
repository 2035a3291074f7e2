"""One arm on one case, in a process of its own: `python -m moe_accel.bench.worker JOB.json`.

The job says where the result goes. The order is that of a promise: build, compute once, compare with the reference,
and only then time.
"""

import gc
import json
import math
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_accel.bench import arms, check, flops, routing, suites
from moe_accel.bench.ceilings import grouped_tflop_s, matmul_tflop_s
from moe_accel.bench.measure import kept_gib, peak_gib, timed
from moe_accel.bench.options import Case
from moe_accel.bench.shapes import SHAPES
from moe_accel.experts import is_decorated

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What the process is to do.

    Attributes:
        case: what is computed.
        arm: who computes it; `ceilings` measures the device instead.
        result: file to write, JSON.
        reference: file of the reference's fingerprints; arm native writes it, the others read it.
        check_batch: sequences that are compared.
        time: whether to time after the check; the reference alone may be wanted.
        device, dtype: auto as in `Options`.
        steps, warmup, rank, checkpointing, kernels, peer_module: as in `Options`.
    """

    case: Case
    arm: str
    result: str
    reference: str
    check_batch: int
    time: bool
    device: str
    dtype: str
    steps: int
    warmup: int
    rank: int
    checkpointing: bool
    kernels: str
    peer_module: str | None


def main(path: str) -> None:
    """Do the job of a file."""
    values = json.loads(Path(path).read_text())
    job = Job(**(values | {"case": Case(**values["case"])}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if job.device == "auto" else job.device
    device = torch.device(device)
    dtype = DTYPES[("bf16" if device.type == "cuda" else "fp32") if job.dtype == "auto" else job.dtype]
    measured: dict[str, Any] = {}
    try:
        ceilings(job, device, dtype, measured) if job.arm == "ceilings" else measure(job, device, dtype, measured)
    except Exception as error:  # whatever an arm raises is its result
        traceback.print_exc()
        measured["error"] = f"{type(error).__name__}: {getattr(error, 'message', error)}"
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    Path(job.result).write_text(json.dumps(_finite(measured | {"about": about}), allow_nan=False))


def _finite(value: Any) -> Any:
    """The same for JSON, which has no nan and no infinity: they become words."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measure(job: Job, device: torch.device, dtype: torch.dtype, row: dict[str, Any]) -> None:
    """Fill the row of one arm, without time where the check fails."""
    case, shape = job.case, SHAPES[job.case.shape]
    peer = arms.load_peer(job.peer_module) if job.arm == "peer" and job.peer_module else None
    arms.before_build(job.arm, shape, peer)
    whole = case.suite != "kernel"
    model = suites.build(case, device, dtype, job.rank, job.checkpointing)
    block, experts = next(routing.experts_children(model))
    top_k, num_experts = flops.top_k(block), flops.stack(experts).num_experts
    step_flops = flops.step_flops(model if whole else block, case.tokens, case.seq_len)
    row |= {
        "model_tflop": step_flops / 1e12,
        "active_parameters": round(flops.active_parameters(model if whole else block)),
        "parameters": sum(each.numel() for each in (model if whole else block).parameters()),
    }
    routing.install(model, case.routing, case.tokens, top_k, num_experts)
    optimizer = suites.adamw(model) if whole else None
    vocabulary = model.config.vocab_size
    model, optimizer, said = arms.apply(job.arm, model, optimizer, shape, device, job.kernels, peer, whole)
    if whole:
        step = suites.trained_step(model, optimizer, case, device, vocabulary)
    else:
        step = suites.block_step(model, case, device, job.arm == "compile")
    row |= {"report": said, "check": checked(job, model, step, dtype)}
    if job.time and row["check"]["ok"]:
        row |= times(job, step, device, step_flops)


def checked(job: Job, model: Any, step: suites.Step, dtype: torch.dtype) -> dict[str, Any]:
    """Compare with the reference, or be it."""
    found = compute(model, step, job.check_batch)
    if job.arm == "native":
        noisy = []
        for seed in range(check.NOISY_RUNS):
            with step.noise(seed):
                noisy.append(compute(model, step, job.check_batch))
        torch.save((found, noisy), job.reference)
        return {"ok": True, "reference": True, "sequences": job.check_batch, "loss": found.loss}
    reference, noisy = torch.load(job.reference, weights_only=False)
    verdict = check.compare(found, reference, noisy, dtype)
    return {"ok": not verdict.problems, "sequences": job.check_batch, "loss": found.loss} | asdict(verdict)


def compute(model: Any, step: suites.Step, batch: int) -> check.Fingerprint:
    """Forward and backward once, and what is kept of it; no gradient stays."""
    loss = step.once(batch)
    found = check.fingerprint(None if loss is None else loss.item(), step.named())
    step.kept.clear()
    for parameter in model.parameters():
        parameter.grad = None
    return found


def times(job: Job, step: suites.Step, device: torch.device, step_flops: float) -> dict[str, Any]:
    """Median and quartiles of the steps, what follows from them, memory, losses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the check left over is nobody's peak
    times_ms, returned = timed(step.run, job.warmup, job.steps, device)
    memory = peak_gib(device)
    lower, median, upper = torch.tensor(times_ms, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75]).double()
    )
    losses = [each.item() for each in returned if each is not None]
    return memory | {
        "median_ms": round(median.item(), 4),
        "quartiles_ms": [round(lower.item(), 4), round(upper.item(), 4)],
        "times_ms": [round(each, 4) for each in times_ms],
        "tok_s": round(job.case.tokens / median.item() * 1e3, 1),
        "tflop_s": round(step_flops / median.item() / 1e9, 4),
        "losses": [round(each, 6) for each in losses],
        "kept_gib": kept_gib(step.forward, device) if step.forward else None,
    }


def ceilings(job: Job, device: torch.device, dtype: torch.dtype, measured: dict[str, Any]) -> None:
    """What the device does at most, in TFLOP/s."""
    case = Case("kernel", job.case.shape, "balanced", 1, job.case.tokens, job.case.seq_len)
    measured["matmul_tflop_s"] = round(matmul_tflop_s(device, dtype), 4)
    model = suites.build(case, device, dtype, job.rank, False)
    block, experts = next((block, each) for block, each in routing.experts_children(model) if is_decorated(each))
    try:
        rate = grouped_tflop_s(case.tokens, experts, flops.top_k(block), device, dtype)
        measured["grouped_mm_tflop_s"] = round(rate, 4)
    except (RuntimeError, NotImplementedError) as error:  # not on every device in every dtype
        measured |= {"grouped_mm_tflop_s": None, "grouped_mm_error": str(error).splitlines()[0]}


if __name__ == "__main__":
    main(sys.argv[1])
