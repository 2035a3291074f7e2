"""Lines for the report, where something is not computed or sharded as well as it could be, and why."""

from collections import Counter
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from moe_accel import experts, kept, lora
from moe_accel.experts.gated import why_not_gated
from moe_accel.report import Choice


def told_of_lora(kernels: Choice, model: nn.Module, precision: str) -> list[str]:
    """Let LoRA on linear layers be computed in one function, where kernels are not asked to be as transformers has."""
    if kernels.value == "reference":
        return []
    num_layers, reasons = lora.install(model, autocasts=precision in ("bf16", "fp16"))
    rounded = precision == "no" and lora.num_rounded(model)
    how = f", {rounded} with fp32 adapters multiplied in bf16" if rounded else ""
    said = [f"LoRA on {num_layers} linear layers added into their products{how}"] if num_layers else []
    return said + [f"LoRA on {num} linear layers computed by PEFT in training: {why}" for why, num in reasons.items()]


def told_of_general_path(kernels: Choice, found: list[tuple[str, Any]]) -> list[str]:
    """Lines for the report where experts are computed as separate operations, and why."""
    if kernels.value == "reference":
        return []
    reasons = Counter(why for _, module in found if (why := why_not_gated(module)) is not None)
    return [f"experts of {num} of {len(found)} layers as separate operations: {why}" for why, num in reasons.items()]


GATHERED_BYTES = 6e9
"""What a GPU has room for besides, in parameters and once more in their gradients."""


def told_of_wrapping(model: nn.Module, found: list[tuple[str, Any]], accelerator: Accelerator) -> list[str]:
    """Lines for the report: where FSDP2 gathers little, layer by layer, which takes the host longer than the GPU; and
    where it knows no layers and is to checkpoint them."""
    if not accelerator.is_fsdp2:
        return []
    config: Any = accelerator.parallelism_config
    plugin: Any = accelerator.state.fsdp_plugin
    if not kept.knows_layers(model, plugin):
        by_transformers = (
            "activation_checkpointing by transformers: accelerate knows no layers without an auto-wrap policy"
        )
        return [by_transformers] if plugin.activation_checkpointing else []
    if accelerator.device.type != "cuda" or not config.ep_size == accelerator.num_processes > 1:
        return []
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.activation_checkpointing_offload:
        return []
    of_experts = {parameter for _, module in found for _, parameter in experts.stacked_parameters(module)}
    computed = None if accelerator.mixed_precision == "no" else 2
    others = (each for each in model.parameters() if each not in of_experts)
    gathered = sum(each.numel() * (computed or each.itemsize) for each in others)
    if gathered > GATHERED_BYTES:
        return []
    at_once = f"would gather all but the experts, {gathered / 1e9:.1f} GB, at once and not layer by layer"
    return [f"fsdp_auto_wrap_policy: NO_WRAP {at_once}: faster with few tokens a GPU"]
