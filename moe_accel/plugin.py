"""The story: what `accelerator.prepare(model, optimizer)` does with a mixture of experts, top to bottom.

    install        once per Accelerator, called by `MoEConfig`: versions, dispatcher and kernels are checked, hooks set
    swap_experts   at prepare(): every experts module of the model computes with our experts function
    shard_model    at prepare(), under FSDP2: expert weights over (efsdp, ep), the rest as accelerate does it
    report         rank 0 says what was done

Every hook is one line in `install`, acts only for accelerators that carry a `MoEConfig`, and leaves others alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import accelerate.accelerator
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe_accel import block, checkpoint, engine, experts, garbage, graphs, kept, loss, padding, streaming
from moe_accel import optimizer as optimizers
from moe_accel.dispatch import choose
from moe_accel.errors import UnsupportedModelError
from moe_accel.experts.gathered import LEAST_PAIRS
from moe_accel.hooks import wrap
from moe_accel.kernels import te, te_parts
from moe_accel.mesh import check_experts
from moe_accel.prefetch import prefetch_experts
from moe_accel.report import Choice, Report, say
from moe_accel.shard import restore_buffers, shard_experts, without_experts
from moe_accel.told import told_of_general_path, told_of_lora, told_of_wrapping
from moe_accel.versions import check_versions

_installed: WeakKeyDictionary[Accelerator, list[Report]] = WeakKeyDictionary()


def install(accelerator: Accelerator) -> None:
    """Make an Accelerator that carries a `MoEConfig` prepare mixtures of experts; checks all that needs no model.

    Raises:
        ConfigError: a value of the config is not available.
        DependencyError: a package is missing, too old or too new.
    """
    check_versions()
    config: Any = accelerator.parallelism_config
    choose_kernels(config.kernels, accelerator.device, config.te_parts)
    choose.check(config.dispatcher, config.ep_size, accelerator.device)
    experts.register()
    _installed.setdefault(accelerator, [])
    checkpoint.install(accelerator)
    kept.install()
    streaming.install(accelerator)
    wrap(Accelerator, "prepare", _prepare)
    wrap(Accelerator, "prepare_model", _prepare_model)
    wrap(Accelerator, "prepare_optimizer", _prepare_optimizer)
    wrap(Accelerator, "free_memory", _free_memory)
    wrap(accelerate.accelerator, "fsdp2_prepare_model", _fsdp2_prepare_model)


def reports(accelerator: Accelerator) -> tuple[Report, ...]:
    """What was done to each model that this Accelerator prepared."""
    return tuple(_installed.get(accelerator, ()))


def _prepare(original: Callable) -> Callable:
    """Around `Accelerator.prepare`."""

    def prepare(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        models = [each for each in args if isinstance(each, nn.Module)]
        if self in _installed:
            swap_all(self, models)
            read_whole_models(self, models)
        prepared = original(self, *args, **kwargs)
        if self in _installed and self.num_processes > 1 and models:
            garbage.set_aside()
        return prepared

    return prepare


def _prepare_model(original: Callable) -> Callable:
    """Around `Accelerator.prepare_model`, which Trainer calls itself to evaluate without training."""

    def prepare_model(self: Accelerator, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in _installed or not experts.has_experts(model):
            return original(self, model, *args, **kwargs)
        swap_all(self, [model])
        read_whole_models(self, [model])
        prepared = original(self, model, *args, **kwargs)
        if self.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU):
            experts.join_adapters(model)
        return prepared

    return prepare_model


def _prepare_optimizer(original: Callable) -> Callable:
    """Around `Accelerator.prepare_optimizer`."""

    def prepare_optimizer(self: Accelerator, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = self.parallelism_config
        if self in _installed and config.kernels != "reference":
            optimizers.install(optimizer, self.device)
        return original(self, optimizer, *args, **kwargs)

    return prepare_optimizer


def _free_memory(original: Callable) -> Callable:
    """Around `Accelerator.free_memory`, which collects garbage."""

    def free_memory(self: Accelerator, *objects: Any) -> Any:
        if self in _installed:
            garbage.bring_back()
        return original(self, *objects)

    return free_memory


def _fsdp2_prepare_model(original: Callable) -> Callable:
    """Around the `fsdp2_prepare_model` that `Accelerator.prepare` calls."""

    def fsdp2_prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
        if accelerator not in _installed or any(isinstance(module, FSDPModule) for module in model.modules()):
            return original(accelerator, model)
        return shard_model(accelerator, model, original)

    return fsdp2_prepare_model


def swap_all(accelerator: Accelerator, models: list[nn.Module]) -> None:
    """Swap the experts of every mixture of experts among `models`; a dense model beside one is left to accelerate.

    Raises:
        UnsupportedModelError: there is no mixture of experts, now or in an earlier prepare().
    """
    dense = [model for model in models if not experts.has_experts(model)]
    if len(dense) == len(models) and not _installed[accelerator]:
        for model in dense:
            experts.find_experts(model)  # says what is wrong with it
    for model in models:
        if model not in dense and not _is_swapped(model):
            report = swap_experts(accelerator, model)
            _installed[accelerator].append(report)
            if accelerator.is_main_process:
                say(report)


def swap_experts(accelerator: Accelerator, model: nn.Module) -> Report:
    """Let every experts module of the model compute with the experts function.

    Raises:
        UnsupportedModelError: the model cannot be swapped, or somebody else distributed it.
        ConfigError: ep_size does not divide the number of experts, or the dispatcher asked for does not fit.
    """
    config: Any = accelerator.parallelism_config
    refuse_distributed(model)
    found = experts.find_experts(model)
    check_experts(config.ep_size, [module.num_experts for _, module in found], config.dp_shard_size)
    adapted = experts.install_adapters(model, found)
    checkpoint.install_on_model(accelerator, _unwrapped(model))
    absent = forget_absent_layers(_unwrapped(model))
    kept_said = kept.keep(_unwrapped(model), config.kept_layers, accelerator)

    parts, te_said, computed = [], [], how_computed(accelerator, model)
    if config.kernels == "te":
        parts, te_said = engine.choose(_unwrapped(model), config.te_parts, computed)
    kernels = choose_kernels(config.kernels, accelerator.device, parts)
    of_te = tuple(each for each in te_parts.OF_EXPERTS if each in parts)
    of_experts = "fused" if kernels.value == "te" and not of_te else kernels.value
    group = config.sparse_mesh.get_group("ep") if config.ep_size > 1 else None
    dispatcher = choose.choose(config.dispatcher, group, traffic(found), accelerator.device)
    lean = kept.kept_experts(_unwrapped(model))
    for _, module in found:
        transport = group and choose.transport(dispatcher, group, module.num_experts // config.ep_size)
        ep_rank = transport.rank if transport else 0
        settings = experts.Settings(of_experts, transport, config.ep_size, ep_rank, module in lean, of_te=of_te)
        experts.install(module, settings)
    beside_said = experts.compute_beside(found, model) if config.ep_size > 1 else []
    used = experts.computing(model, found)
    gathers = of_experts == "fused" and not adapted
    if gathers and any(experts.may_gather(module, accelerator.device) for _, module in used):
        kernels = Choice(kernels.value, f"{kernels.reason}, which gather their rows from {LEAST_PAIRS:,} on")
    counts = list(experts.expert_parameter_counts(used))
    sizes = sorted({module.num_experts for _, module in used})
    return Report(
        model=type(_unwrapped(model)).__name__,
        mesh=_mesh(accelerator),
        num_swapped=len(used),
        experts_classes=", ".join(sorted({type(module).__name__ for _, module in found})),
        num_experts=" or ".join(map(str, sizes)),
        num_local_experts=" or ".join(str(size // config.ep_size) for size in sizes),
        dispatcher=dispatcher,
        kernels=kernels,
        **choose_rest(kernels, _unwrapped(model), accelerator, parts),
        num_expert_parameters=sum(count for count, _ in counts),
        num_trainable=sum(count for count, trainable in counts if trainable),
        notes=(
            *experts.told_of_adapters(model, used, adapted),
            *told_of_general_path(kernels, used),
            *beside_said,
            *te_said,
            *engine.install(_unwrapped(model), parts),
            *(
                graphs.install(
                    _unwrapped(model),
                    accelerator.device,
                    computed.compiled,
                    computed.by_fsdp2,
                    why_no_block_graphs(accelerator, dispatcher, of_experts, used),
                )
                if config.cuda_graphs
                else ()
            ),
            *told_of_lora(kernels, model, accelerator.mixed_precision),
            *padding.told_of_attention(model),
            *told_of_wrapping(model, found, accelerator),
            *kept_said,
            *(f"no {name} in this model: not a layer for FSDP2 to wrap" for name in absent),
        ),
    )


def shard_model(accelerator: Accelerator, model: nn.Module, stock: Callable) -> nn.Module:
    """Shard the model: experts over (efsdp, ep), everything else by `stock`, accelerate's own function."""
    config: Any = accelerator.parallelism_config
    plugin: Any = accelerator.state.fsdp_plugin
    swapped = [(name, module) for name, module in model.named_modules() if hasattr(module, "_moe_accel")]
    apart = swapped if config.ep_size > 1 else []
    by_shards = streaming.settle(model)
    from_rank_0 = plugin.cpu_ram_efficient_loading and not by_shards
    with streaming.by_shards(model, accelerator) if by_shards else nullcontext():
        detached = without_experts(model, apart, take_buffers=from_rank_0)
        model = stock(accelerator, model)
        restore_buffers(detached, accelerator.device)
        if apart:
            shard_experts(detached, config.sparse_mesh, accelerator)
            if config.sparse_mesh["efsdp"].size() > 1:  # else there is nothing to gather
                prefetch_experts(model)
    experts.join_adapters(model)
    graphs.keep_in_place(model)
    return model


def read_whole_models(accelerator: Accelerator, models: list[nn.Module]) -> None:
    """Without FSDP2 every rank needs all weights: those still in their files are read onto its device, one by one."""
    if models and not accelerator.is_fsdp2:
        streaming.read_all_onto(models, accelerator.device if accelerator.device_placement else torch.device("cpu"))


def choose_kernels(asked: str, device: torch.device, parts: Sequence[str] = ("experts",)) -> Choice:
    """`fused`, `reference` or `te`, with the reason. `auto` is never `te`: torch's grouped_mm was measured faster.

    `parts`: what is TransformerEngine's under `te`.

    Raises:
        ConfigError: `te` on a device that TransformerEngine does not compute on.
        DependencyError: `te` without the package, or with one that cannot be used.
    """
    if asked == "te" and not parts:
        return Choice("fused", "asked for te, of which nothing is left")
    if asked == "te":
        te_parts.check(device, parts)
        whose = f"{te_parts.told(parts)} by TransformerEngine {te.version()}".rstrip()
        waits = "; waits once a layer for the experts' row counts" if "experts" in parts else ""
        return Choice("te", f"asked for: {whose}, all else as fused{waits}")
    if asked == "reference":
        return Choice("reference", "asked for: one expert after the other, slow and true")
    how = "grouped GEMMs for bf16 on this GPU" if device.type == "cuda" else "one product per expert on this device"
    return Choice("fused", f"{'asked for' if asked == 'fused' else asked}: {how}")


def _is_compiled_by(accelerator: Accelerator) -> bool:
    dynamo: Any = getattr(accelerator.state, "dynamo_plugin", None)
    return dynamo is not None and dynamo.backend != DynamoBackend.NO


def how_computed(accelerator: Accelerator, model: nn.Module) -> engine.Computed:
    """How this Accelerator is to train a model."""
    compiled = hasattr(model, "_orig_mod") or _is_compiled_by(accelerator)
    precision = accelerator.mixed_precision
    if accelerator.is_fsdp2:
        plugin: Any = accelerator.state.fsdp_plugin
        cast = getattr(plugin.mixed_precision_policy, "param_dtype", None)
        precision = "bf16" if cast == torch.bfloat16 else "fp16" if cast == torch.float16 else precision
    return engine.Computed(precision, accelerator.is_fsdp2, compiled)


def choose_rest(
    kernels: Choice, model: nn.Module, accelerator: Accelerator, parts: Sequence[str] = ()
) -> dict[str, Choice]:
    """How the rest of a block, the loss of `labels=` and padding are computed, and why, as fields of the report."""
    if kernels.value == "reference":
        native = Choice("native", "as transformers does it, with kernels: reference")
        return {"block": native, "loss": native, "padding": Choice("computed", native.reason)}
    config: Any = accelerator.parallelism_config
    return {
        "block": block.install(model, accelerator.device, accelerator.mixed_precision, parts),
        "loss": loss.install(model, accelerator.mixed_precision),
        "padding": padding.install(model, config.padding_free, _is_compiled_by(accelerator)),
    }


def why_no_block_graphs(
    accelerator: Accelerator, dispatcher: Choice, kernels: str, used: list[tuple[str, Any]]
) -> str | None:
    """Why blocks with experts cannot be recorded; empty where nobody asked; None where they can. A collective call."""
    config: Any = accelerator.parallelism_config
    if config.ep_size == 1 or config.cuda_graphs == "attention":
        return ""
    if config.sparse_mesh.size() > config.ep_size:
        return "FSDP2 gathers experts, of which other groups of ranks have parts"
    return graphs.why_no_blocks(config.sparse_mesh.get_group("ep"), dispatcher.value, kernels, used)


def traffic(found: list[tuple[str, Any]]) -> choose.Traffic:
    """What the layers send to each other, by those with the most experts."""
    largest = max((module for _, module in found), key=lambda module: module.num_experts)
    top_k = getattr(largest.config, "num_experts_per_tok", None) or min(8, largest.num_experts)
    return choose.Traffic(largest.num_experts, experts.hidden_size(largest), top_k)


def refuse_distributed(model: nn.Module) -> None:
    """Raise UnsupportedModelError where transformers (or anybody) distributed the model at from_pretrained."""
    asked = getattr(getattr(_unwrapped(model), "config", None), "distributed_config", None) is not None
    if asked or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(_unwrapped(model)).__name__} is distributed already "
            f"({'distributed_config' if asked else 'its parameters are DTensors'})",
            "load it without distributed_config, tp_plan and device_map; or remove moe_config",
        )


def forget_absent_layers(model: nn.Module) -> list[str]:
    """Take layer classes that the model does not have off its list of those to wrap; returns them.

    accelerate 1.15 stops at them: `Qwen3_5MoeForCausalLM` lists the vision block of the multimodal model.
    """
    listed: Any = getattr(model, "_no_split_modules", None) or ()
    present = {type(module).__name__ for module in model.modules()}
    absent = sorted(set(listed) - present)
    if absent:
        setattr(model, "_no_split_modules", set(listed) & present)  # noqa: B010 no Module or Tensor, says pyright
    return absent


def _is_swapped(model: nn.Module) -> bool:
    return all(hasattr(module, "_moe_accel") for module in model.modules() if experts.is_decorated(module))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def _mesh(accelerator: Accelerator) -> Choice:
    config: Any = accelerator.parallelism_config
    ranks = accelerator.num_processes
    if config.ep_size == 1:
        how = f"{'FSDP2' if accelerator.is_fsdp2 else accelerator.distributed_type.value} as accelerate does it"
        if accelerator.distributed_type == DistributedType.NO:
            how = "not distributed"
        return Choice(f"{ranks} rank{'s' if ranks > 1 else ''}", f"{how}, ep_size 1")
    efsdp = config.dp_shard_size // config.ep_size
    replicas = f"dp_replicate {config.dp_replicate_size} x " if config.dp_replicate_size > 1 else ""
    sparse = f"{replicas}efsdp {efsdp} x ep {config.ep_size}"
    return Choice(f"experts {sparse}", f"all else {replicas}dp_shard {config.dp_shard_size}, {ranks} ranks")
