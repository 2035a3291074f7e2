"""What ranks of `several.py` share: the job, the arms, and a training that is timed.

The model is that of `moe-accel bench`: random weights that depend on a parameter's name alone, so that every arm has
the same ones, however it spreads them and whichever transformers it has.
"""

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_accel.bench import flops, routing, suites
from moe_accel.bench.measure import GIB
from moe_accel.bench.options import Case
from moe_accel.dispatch import deepep
from moe_accel.graphs.agreement import RAGGED
from moe_accel.ranks import gather
from tests.gpu.several_cases import DEEPEP, GRAPHS, RECOMPUTED, is_mixed


class Skip(Exception):
    """The arm cannot be had here; says why."""


@dataclass(frozen=True)
class Job:
    """What a rank is to do: a `several_cases.Case`, and how.

    Attributes:
        kind, arm, gpus, batch, layers: of the case; `write` is a kind, too: the checkpoint of the loading cases.
        shape: of `moe-accel bench`.
        sequence: tokens a sequence.
        warmup, steps: of a timed training; a parity training has `steps` in all.
        device: `cuda` or `cpu`.
        folder: where `RANK.json` goes.
        checkpoint: of the loading cases; beside it is saved.
    """

    kind: str
    arm: str
    gpus: int
    batch: int
    layers: int
    shape: str
    sequence: int
    warmup: int
    steps: int
    device: str
    folder: str
    checkpoint: str


def train(job: Job) -> Iterator[dict[str, Any]]:
    """One part for each routing: losses, gradient norms of the untimed steps, times and memory of the others."""
    device = own_device(job)
    check_arm(job)
    stages = Stages()
    case, model = build(job, device)
    stages.end("model")
    vocabulary = model.config.vocab_size
    block, experts = next(routing.experts_children(model))
    top_k, num_experts = flops.top_k(block), flops.stack(experts).num_experts
    model, optimizer, said = spread(job, model)
    gc.collect()  # the parts of the whole model that other ranks have
    if device.type == "cuda":
        torch.cuda.empty_cache()
    stages.end("prepare")
    ranks = range(job.gpus) if job.arm == "one" else [int(os.environ.get("RANK", "0"))]
    untimed, timed = untimed_and_timed(job)
    all_batches = [[batch_of(rank, step, job, vocabulary, device) for rank in ranks] for step in steps_of(job)]
    of_steps = itertools.cycle(all_batches)

    def forward_backward() -> Tensor:
        losses, batches = [], next(of_steps)
        for batch in batches:
            loss = model(**batch).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if "first step" not in stages.seconds:
            synchronize(device)
            stages.end("first step")

    for kind in ("random", "balanced") if job.kind in ("full", "lora") else ("random",):
        routing.install(model, kind, case.tokens, top_k, num_experts)
        found = steps(forward_backward, update, model, device, untimed, timed)
        yield {"routing": kind, "said": said, "stages_s": stages.seconds} | found | rates(found, useful(all_batches))


class Stages:
    """Seconds of what comes before training, by name: `start` is from this process to the first of them."""

    def __init__(self) -> None:
        self.at = time.time()
        self.seconds = {"start": round(self.at - started(), 1)}

    def end(self, name: str) -> None:
        """Of a stage."""
        before, self.at = self.at, time.time()
        self.seconds[name] = round(self.at - before, 1)


def started() -> float:
    """When this process did, as `time.time` counts."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def build(job: Job, device: torch.device) -> tuple[Case, Any]:
    """The model of a training, and the bench's name for it."""
    suite = "lora" if job.kind == "lora" else "full"
    case = Case(suite, job.shape, "random", job.layers, job.batch * job.sequence, job.sequence)
    dtype = torch.bfloat16 if device.type == "cuda" and not is_mixed(job.arm) else torch.float32
    return case, suites.build(case, device, dtype, 16, checkpointing=job.arm in RECOMPUTED)


def own_device(job: Job) -> torch.device:
    """This rank's GPU, made the current one; on the CPU, accelerate is told that FSDP2 is possible."""
    if job.device == "cpu":
        from moe_accel.cpu import enable_fsdp_on_cpu

        enable_fsdp_on_cpu()
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def untimed_and_timed(job: Job) -> tuple[int, int]:
    """Steps of each."""
    if job.kind == "parity":
        return job.steps, 0
    return job.warmup + (RAGGED + 1 if job.kind == "ragged" else 0), job.steps


def steps_of(job: Job) -> range:
    """Numbers of the steps that have batches of their own: ragged ones."""
    return range(sum(untimed_and_timed(job)) if job.kind == "ragged" else 1)


def batch_of(rank: int, step: int, job: Job, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """What the model is called with, the same in every arm: the same in every step; or ragged, see `ragged_of`."""
    if job.kind == "ragged":
        batch = ragged_of(1000 * step + rank, job, vocabulary)
    else:
        tokens = tokens_of(rank, job, vocabulary)
        batch = {"input_ids": tokens, "labels": tokens}
    return {name: each.to(device) for name, each in batch.items()}


def tokens_of(rank: int, job: Job, vocabulary: int) -> Tensor:
    """The batch of a rank, [batch, sequence], the same in every arm and step."""
    generator = torch.Generator().manual_seed(1 + rank)
    return torch.randint(vocabulary, (job.batch, job.sequence), generator=generator)


def ragged_of(number: int, job: Job, vocabulary: int) -> dict[str, Tensor]:
    """A batch [batch, sequence / batch] of which a tenth of each row to all of it is real, the rest padding."""
    generator = torch.Generator().manual_seed(1 + number)
    tokens = torch.randint(vocabulary, (job.batch, job.sequence // job.batch), generator=generator)
    lengths = (torch.rand(job.batch, 1, generator=generator) * 0.9 + 0.1) * tokens.shape[1]
    mask = torch.arange(tokens.shape[1]) < lengths
    return {"input_ids": tokens, "labels": tokens.masked_fill(~mask, -100), "attention_mask": mask.long()}


def useful(batches: Sequence[Sequence[Mapping[str, Tensor]]]) -> float:
    """Tokens of a step that are no padding, on average over all steps and ranks."""
    own = [float((each["labels"] != -100).sum()) for of_step in batches for each in of_step]
    return statistics.mean(itertools.chain(*gathered(own)))


def check_arm(job: Job) -> None:
    """Leave before there is a model where the arm is known not to work.

    Raises:
        Skip: with the reason.
    """
    if job.arm in DEEPEP:
        if job.device == "cpu":
            raise Skip("DeepEP needs a GPU")
        import deep_ep  # pyright: ignore[reportMissingImports]

        name = deepep.KINDS[DEEPEP[job.arm]]
        if not hasattr(deep_ep, name):
            raise Skip(f"the deep_ep that is installed has no {name}")
    if job.arm == "native_ep":
        distributed_config(job)


def distributed_config(job: Job) -> Any:
    """How transformers is told to spread experts itself."""
    import transformers
    from transformers.distributed import DistributedConfig

    if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
        raise Skip(f"transformers {transformers.__version__} has no all-to-all expert parallelism (5.19 has): --newer")
    return DistributedConfig(fsdp_size=job.gpus, ep_size=job.gpus)  # pyright: ignore[reportCallIssue]


def spread(job: Job, model: Any) -> tuple[Any, Any, str]:
    """Model and optimizer over the ranks, as the arm does it; and what moe-accel reports."""
    if job.arm == "native_ep":
        config = distributed_config(job)
        _, _, mesh = type(model).prepare_distribute_model(config)
        model = type(model).maybe_distribute_model(model, config, mesh)
        return model, suites.adamw(model), ""
    optimizer = suites.adamw(model)
    if job.arm == "one" or (job.arm.startswith("stock") and job.gpus == 1):
        return model, optimizer, ""
    accelerator = accelerator_of(job)
    model, optimizer = accelerator.prepare(model, optimizer)
    from moe_accel.plugin import reports

    return model, optimizer, "\n".join(map(str, reports(accelerator)))


def accelerator_of(job: Job) -> Any:
    """Stock, or with the arm's `MoEConfig`."""
    from accelerate import Accelerator

    from moe_accel import MoEConfig

    precision = "bf16" if is_mixed(job.arm) else "no"
    if job.arm.startswith("stock"):
        accelerator = Accelerator(mixed_precision=precision)
    else:
        dispatcher = "deepep" if job.arm in DEEPEP else "alltoall"
        kept = "auto" if job.arm == "kept" else 0
        sizes = {"ep_size": 1 if job.arm == "ep1" else job.gpus, "kept_layers": kept}
        config = MoEConfig(dispatcher=dispatcher, cuda_graphs=GRAPHS.get(job.arm, False), **sizes)
        accelerator = Accelerator(mixed_precision=precision, parallelism_config=config)
    if job.gpus > 1 and not (accelerator.is_fsdp2 and accelerator.num_processes == job.gpus):
        raise RuntimeError(f"not FSDP2 on {job.gpus} ranks: {accelerator.distributed_type}")
    return accelerator


def steps(
    forward_backward: Callable[[], Tensor],
    update: Callable[[], None],
    model: nn.Module,
    device: torch.device,
    untimed: int,
    timed: int,
) -> dict[str, Any]:
    """Train; two norms an untimed step. Times: medians of the slowest rank; memory: of the fullest, in timed steps."""
    losses, norms, whole_ms, without_ms = [], [], [], []
    for number in range(untimed + timed):
        if number == untimed:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        marks = [mark(device)]
        losses.append(forward_backward())
        marks.append(mark(device))
        if number < untimed:
            norms += gradient_norms(model)
        update()
        marks.append(mark(device))
        synchronize(device)
        if number >= untimed:
            without_ms.append(between(marks[0], marks[1]))
            whole_ms.append(between(marks[0], marks[2]))
    found: dict[str, Any] = {"losses": [mean(loss).item() for loss in losses], "norms": norms, "steps": timed}
    if timed:
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else ()
        own = [statistics.median(whole_ms), statistics.median(without_ms), statistics.mean(whole_ms)]
        own += [each / GIB for each in peaks]
        worst = [max(values) for values in zip(*gathered(own), strict=True)]
        found |= dict(zip(("ms", "ms_without_optimizer", "mean_ms"), worst, strict=False)) | {"all_ms": whole_ms}
        found |= dict(zip(("peak_gib", "peak_reserved_gib"), worst[3:] or (None, None), strict=True))
    return found


def rates(found: dict[str, Any], tokens: float) -> dict[str, int]:
    """Tokens a second a GPU, with the optimizer in the step and without."""
    names = {"tok_s": "ms", "tok_s_without_optimizer": "ms_without_optimizer"}
    return {name: round(tokens / found[ms] * 1e3) for name, ms in names.items() if ms in found}


def gradient_norms(model: nn.Module) -> list[float]:
    """Of all gradients, and of the experts' alone, which hardly show among all: a shard counts on the rank it is on."""
    own, spread_over = [0.0, 0.0], [0.0, 0.0]
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        spread = isinstance(parameter.grad, DTensor)
        local = parameter.grad.to_local() if spread else parameter.grad
        square = torch.linalg.vector_norm(local, dtype=torch.float32).item() ** 2
        for at in (0, 1) if ".experts." in name else (0,):
            (spread_over if spread else own)[at] += square
    return [(mine + sum(all_ranks)) ** 0.5 for mine, *all_ranks in zip(own, *gathered(spread_over), strict=True)]


def gathered(value: Any) -> list[Any]:
    """`value` of every rank."""
    return gather(value) if dist.is_initialized() else [value]


def mean(loss: Tensor) -> Tensor:
    """Over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def mark(device: torch.device) -> Any:
    """A moment: on the GPU's own clock on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)
