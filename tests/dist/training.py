"""The same training twice: on ranks through accelerate, and in one process without it. What parity is measured on.

A `Job` is what is learnt: model, data, number of steps. `alone` does it in one process with stock transformers and
torch, as plain as it can be written; it is the truth. `on_ranks` does it with Accelerate on every rank of a launch, the
way a script does. How it is spread over ranks (`ep_size`, checkpointing, ...) must not change what is learnt.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.dist.ranks import run_alone
from tests.families import build_tiny, experts_modules, model_class, randomise, tiny_inputs, tiny_loss

LORA = (
    ("r", 3),
    ("lora_alpha", 7),
    ("target_modules", ("q_proj", "o_proj")),
    ("target_parameters", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
)
"""Of attention and experts; no rank that kernels like."""

NUM_RANKS = 4
NUM_SEQUENCES = 2
SEQUENCE = 13

MAX_NORM = 0.25
"""Below the gradient norm of every job, so that clipping always changes the update (`test_parity` checks it)."""

OPTIMIZER = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
"""AdamW divides by sqrt(v) + eps. With the usual eps of 1e-8 an element whose gradient is rounding noise still moves by
a whole lr, in a direction that is noise. With 1e-3, about the size of our gradients, noise in a gradient stays as small
in the update; and the update depends on the gradient's scale, so that a wrong factor shows in the weights."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is learnt.

    Attributes:
        family: key of `FAMILIES`.
        config: overrides of the tiny model's config, as (name, value) pairs.
        routing: "free"; "one-expert-takes-all" (experts 1.. get nothing); "empty-experts" (experts 0 to 3 get nothing).
        lengths: tokens in each sequence of a rank's batch, rank by rank; 0 means that the rank's batch is empty.
        accumulate: backward passes a step.
        num_steps: optimizer steps.
        forwards: micro-batches that go forward before their losses go backward together.
        trainable: regular expression of the names of the parameters that are trained.
        dtype: of the weights before `prepare`.
        lora: arguments of a PEFT LoraConfig, as (name, value) pairs; None: no adapters.
    """

    family: str = "qwen3_moe"
    config: tuple[tuple[str, Any], ...] = ()
    routing: str = "free"
    lengths: tuple[int, ...] = (SEQUENCE,) * NUM_RANKS
    accumulate: int = 1
    num_steps: int = 3
    forwards: int = 1
    trainable: str = ""
    dtype: str = "float32"
    lora: tuple[tuple[str, Any], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a job.

    Attributes:
        losses: loss of every step over the global batch; of a rank, that of its own micro-batches times the ranks.
        gradients: of the first step, whole and before clipping, by parameter name; None where there is none.
        norms: gradient norm of every step, before clipping.
        weights: whole parameters and persistent buffers after the last step, by name.
        num_tokens: tokens that each expert of the first experts module got in all steps; counted in one process.
        experts_mesh: dimensions of the mesh that the first expert weight is spread over, on ranks.
        experts_function: the name that transformers looks up for the experts.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor | None]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    num_tokens: list[int] | None = None
    experts_mesh: tuple[str, ...] = ()
    experts_function: str = ""


def before_fork(job: Job, **_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    model_class(job.family)


def initial_model(job: Job) -> Any:
    """The job's model before the first step."""
    overrides = {name: list(value) if isinstance(value, tuple) else value for name, value in job.config}
    model = build_tiny(job.family, getattr(torch, job.dtype), **overrides)
    if job.routing != "free":
        _steer(model, job.routing)
    if job.lora is not None:
        return _with_adapters(model, job.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(job.trainable, name) is not None)
    return model


def _with_adapters(model: Any, lora: tuple[tuple[str, Any], ...]) -> Any:
    """The model in PEFT's hands, adapters full of noise: both factors have a gradient from the first step on."""
    from peft import LoraConfig, get_peft_model

    given = {name: list(value) if isinstance(value, tuple) else value for name, value in lora}
    adapted = get_peft_model(model, LoraConfig(**given))
    randomise(adapted, seed=7, only="lora_")
    return adapted


@torch.no_grad()
def _steer(model: Any, routing: str) -> None:
    """Make the router choose by feature 0 alone of the hidden states, which is about sqrt(H)=5 for every token."""
    model.get_input_embeddings().weight[:, 0] = 4.0
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[0] = 1.0
        layer.mlp.gate.weight[:, 0] = 0.0
        if routing == "one-expert-takes-all":
            layer.mlp.gate.weight[0, 0] = 2.0
        else:
            layer.mlp.gate.weight[:4, 0] = -2.0


def losses_of(job: Job, model: nn.Module, step: int, rank: int) -> Iterator[torch.Tensor]:
    """The loss of each of the rank's backward passes of a step: its tokens' sum over the tokens of the whole step."""
    length = job.lengths[rank]
    num_forwards = job.accumulate * job.forwards
    num_tokens = num_forwards * sum(NUM_SEQUENCES * (length - 1) for length in job.lengths if length)
    for backward in range(job.accumulate):
        losses = []
        for forward in range(job.forwards):
            seed = 1000 * step + 100 * backward + 10 * forward + rank
            inputs = tiny_inputs(job.family, NUM_SEQUENCES if length else 0, length or SEQUENCE, seed)
            losses.append(tiny_loss(model, {**inputs, "num_items_in_batch": torch.tensor(num_tokens)}))
        yield torch.stack(losses).sum()


@functools.cache
def reference(job: Job) -> Trained:
    """The truth about a job; one run a session, however many cases are compared with it."""
    return run_alone(alone, job=job)


def alone(job: Job) -> Trained:
    """Do the job in one process: the ranks' micro-batches one after the other, gradients summed."""
    model = initial_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses, norms, gradients = [], [], {}
    num_tokens = _count_tokens(model)
    for step in range(job.num_steps):
        losses.append(0.0)
        for rank in range(len(job.lengths)):
            if not job.lengths[rank]:
                continue  # an empty batch adds nothing
            for loss in losses_of(job, model, step, rank):
                loss.backward()
                losses[-1] += loss.item()
        gradients = gradients or _whole_gradients(model)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, gradients, norms, whole(model.state_dict()), num_tokens)


def _count_tokens(model: nn.Module) -> list[int]:
    """A list that counts the tokens of each expert of the first experts module from now on."""
    _, module = next(experts_modules(model))
    counts = [0] * module.num_experts

    def count(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        for expert in arguments[1].flatten().tolist():
            counts[expert] += 1

    module.register_forward_pre_hook(count)
    return counts


def on_ranks(
    job: Job,
    *,
    mixed_precision: str = "no",
    replicas: int = 1,
    gradient_checkpointing: str | None = None,
    garbage: bool = False,
    fused_optimizer: bool = False,
    compile_backend: str | None = None,
) -> Trained:
    """Do the job with Accelerate on this rank of a launch.

    Args:
        job: what to learn.
        mixed_precision: of the Accelerator.
        replicas: HSDP replicas, for stock accelerate; moe_config has an option of its own.
        gradient_checkpointing: None, "reentrant" or "non-reentrant": transformers' own.
        garbage: on every rank but 0, fill weights and persistent buffers with NaN before `prepare`.
        fused_optimizer: AdamW(fused=True).
        compile_backend: torch.compile backend for accelerate's regional compilation.
    """
    from accelerate import Accelerator
    from accelerate.utils import ParallelismConfig, TorchDynamoPlugin

    given: dict[str, Any] = {}
    if replicas > 1:
        shards = len(job.lengths) // replicas
        given["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
    if compile_backend:
        given["dynamo_plugin"] = TorchDynamoPlugin(backend=compile_backend, use_regional_compilation=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=job.accumulate, **given)
    assert accelerator.is_fsdp2, accelerator.distributed_type
    assert accelerator.num_processes == len(job.lengths)
    rank = accelerator.process_index
    model = initial_model(job)
    if garbage and rank > 0:
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": gradient_checkpointing == "reentrant"})
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused_optimizer, **OPTIMIZER)
    model, optimizer = accelerator.prepare(model, optimizer)

    losses, norms, gradients = [], [], {}
    for step in range(job.num_steps):
        losses.append(0.0)
        job_losses = losses_of(job, model, step, rank)
        for _ in range(job.accumulate):
            with accelerator.accumulate(model):
                # FSDP averages over ranks and accelerate divides by the micro-batches; the loss is a share of the sum
                loss = next(job_losses) * accelerator.num_processes
                losses[-1] += loss.item()
                accelerator.backward(loss * job.accumulate)
                if accelerator.sync_gradients:
                    gradients = gradients or _whole_gradients(model)
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM).item())
                optimizer.step()
                optimizer.zero_grad()
    weights = whole(model.state_dict())
    if rank > 0:
        return Trained(losses, {}, norms, {})
    function, mesh = _experts_of(model)
    return Trained(losses, gradients, norms, weights, experts_function=function, experts_mesh=mesh)


def _experts_of(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Name of the experts function, and dimensions of the mesh that the first expert weight is spread over."""
    for _, module in experts_modules(model):
        mesh = module.down_proj.device_mesh
        return module.config._experts_implementation, mesh.mesh_dim_names or ()
    return "none", ()


def failure_of(job: Job, **how: Any) -> tuple[str, str]:
    """The error that `on_ranks` ends with: its class and message."""
    try:
        on_ranks(job, **how)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", "trained without an error"


def _whole_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return whole({name: parameter.grad for name, parameter in model.named_parameters()})


def whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors, gathered from all ranks, under the names that transformers gives them."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        found[name] = None if tensor is None else tensor.detach().clone()
    return found
