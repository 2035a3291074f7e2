"""Layers that are kept from recompute, whoever checkpoints activations and whenever: `kept_layers: N` of `moe_config`.

Checkpointing is switched on by transformers (`gradient_checkpointing_enable`, by the Trainer too), before prepare() or
after it, or by accelerate within prepare() (`fsdp_config: {activation_checkpointing: true}`). So a kept layer carries a
mark, and both leave what is marked alone. Its experts keep less for backward (`lean` in `experts/function.py`): a GiB
is better spent on keeping another layer than on that one output.
"""

from collections.abc import Callable
from typing import Any

import accelerate.accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_accel.errors import ConfigError
from moe_accel.experts import has_experts, is_decorated, settings_of
from moe_accel.hooks import wrap

_MARK = "_moe_accel_kept"
CHOSEN = "_moe_accel_kept_auto"
"""Mark of a model whose kept layers are chosen as it trains: a checkpoint wrapper could not be switched."""


def install() -> None:
    """Let transformers and accelerate leave marked layers alone."""
    wrap(PreTrainedModel, "_set_gradient_checkpointing", _set_gradient_checkpointing)
    wrap(accelerate.accelerator, "fsdp2_apply_ac", _fsdp2_apply_ac)


def keep_layers(model: nn.Module, num_kept: int, fsdp_plugin: Any = None) -> list[str]:
    """Mark the last layers as kept, and switch off what checkpoints them already; returns what the report says.

    Args:
        model: of transformers, not yet sharded.
        num_kept: how many layers.
        fsdp_plugin: accelerate's, where there is one.

    Raises:
        ConfigError: the model has fewer layers, or FSDP 1 is to checkpoint them.
    """
    if not num_kept:
        return []
    layers = list(checkpointed_layers(model).values())
    if num_kept > len(layers):
        raise ConfigError(
            f"kept_layers={num_kept} must be at most {len(layers)}, the layers that {type(model).__name__} checkpoints"
        )
    by_fsdp = bool(getattr(fsdp_plugin, "activation_checkpointing", False))
    if by_fsdp and fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            f"kept_layers={num_kept} needs FSDP version 2 beside activation_checkpointing, not "
            f"{fsdp_plugin.fsdp_version}: all layers would be recomputed",
            "fsdp_config: {fsdp_version: 2}, or kept_layers: 0",
        )
    on = by_fsdp or any(layer.gradient_checkpointing for layer in layers)
    for layer in layers[len(layers) - num_kept :]:
        vars(layer)[_MARK] = True
    _switch_off(model)
    which = "the last layer" if num_kept == 1 else f"the last {num_kept} layers"
    if on:
        return [f"kept_layers: {which} of {len(layers)} will not be recomputed, but for a projection"]
    return [f"kept_layers: nothing is checkpointed so far; if it is later, {which} of {len(layers)} will be left out"]


def checkpointed_layers(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """Layers that are checkpointed, in order, of the lists that have experts: no vision tower, which may come last."""
    named = [(name, each) for name, each in model.named_modules() if isinstance(each, GradientCheckpointingLayer)]
    lists = {name.rpartition(".")[0] for name, layer in named if any(map(is_decorated, layer.modules()))}
    return {name: layer for name, layer in named if name.rpartition(".")[0] in lists}


def set_kept(layer: nn.Module, kept: bool) -> None:
    """Keep a layer from now on, or let it be checkpointed again if it would be without us; its experts follow."""
    if kept == is_kept(layer):
        return
    if kept:
        vars(layer)[_MARK] = layer.gradient_checkpointing
    checkpointed: Any = False if kept else vars(layer).pop(_MARK)
    layer.gradient_checkpointing = checkpointed
    for module in filter(is_decorated, layer.modules()):
        settings_of(module).lean = kept


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed, or would be if it was not kept."""
    return bool(vars(layer).get(_MARK, False) or layer.gradient_checkpointing)


def kept_experts(model: nn.Module) -> set[nn.Module]:
    """The experts modules of the layers that are kept."""
    return {module for layer in filter(is_kept, model.modules()) for module in filter(is_decorated, layer.modules())}


def is_kept(module: nn.Module) -> bool:
    """Whether this is a layer that is kept."""
    return _MARK in vars(module)


def _switch_off(model: nn.Module) -> None:
    for layer in filter(is_kept, model.modules()):
        setattr(layer, "gradient_checkpointing", False)  # noqa: B010 no Module or Tensor, says pyright


def _set_gradient_checkpointing(original: Callable) -> Callable:
    """Around `PreTrainedModel._set_gradient_checkpointing`, by which `gradient_checkpointing_enable` does it."""

    def set_gradient_checkpointing(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for layer in filter(is_kept, self.modules()):
            vars(layer)[_MARK] = layer.gradient_checkpointing
        _switch_off(self)

    return set_gradient_checkpointing


def _fsdp2_apply_ac(original: Callable) -> Callable:
    """Around the `fsdp2_apply_ac` that `Accelerator.prepare` calls: it wraps layers, or parts of them."""

    def fsdp2_apply_ac(accelerator: Any, model: nn.Module) -> nn.Module:
        plugin = accelerator.state.fsdp_plugin
        chosen = [each for each in model.modules() if CHOSEN in vars(each)]
        if not chosen and not knows_layers(model, plugin):
            chosen = _unwrappable(model, plugin)
        for each in chosen:
            _checkpoint(each)
        if chosen:
            return model
        model = original(accelerator, model)
        unwrap_kept(model)
        return model

    return fsdp2_apply_ac


def _checkpoint(model: Any) -> None:
    """Let transformers checkpoint the layers of one of its models: by a flag of each, which can be switched.

    It also lets the embeddings' output require a gradient, which only reentrant checkpointing needs: frozen layers
    would be computed twice.
    """
    had_hooks = bool(getattr(model, "_require_grads_hooks", None))
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if not had_hooks:
        model.disable_input_require_grads()


def knows_layers(model: nn.Module, fsdp_plugin: Any) -> bool:
    """Whether accelerate knows layers to wrap: not without an auto-wrap policy, nor with one that is not its own."""
    return fsdp2_prepare_auto_wrap_policy(fsdp_plugin, model) is not None


def _unwrappable(model: nn.Module, fsdp_plugin: Any) -> list[Any]:
    """The mixtures of experts of transformers in a model, outermost; none of a model without experts, where accelerate
    fails for want of layers to wrap.

    Raises:
        ConfigError: accelerate is to offload what is checkpointed, too, which transformers does not.
    """
    mixtures = [each for each in model.modules() if isinstance(each, PreTrainedModel) and has_experts(each)]
    inner = {part for each in mixtures for part in each.modules() if part is not each}
    found = [each for each in mixtures if each not in inner]
    if found and fsdp_plugin.activation_checkpointing_offload:
        raise ConfigError(
            "activation_checkpointing_offload needs an auto-wrap policy of layers, and NO_WRAP, the default, is none",
            "fsdp_config: without activation_checkpointing_offload, or fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        )
    return found


def unwrap_kept(model: nn.Module) -> None:
    """Take the kept layers, and what is in them, out of torch's checkpoint wrappers.

    Raises:
        ConfigError: a wrapper holds more than a kept layer, which can't be recomputed without it.
    """
    kept = [each for each in model.modules() if is_kept(each)]
    parts = {id(part) for layer in kept for part in layer.modules()}
    for name, wrapper in reversed(list(model.named_modules())):  # what is inside of a wrapper first
        if not isinstance(wrapper, ActivationWrapper):
            continue
        inner: Any = wrapper._checkpoint_wrapped_module
        if id(inner) in parts:
            model.set_submodule(name, inner)
        elif any(is_kept(each) for each in inner.modules()):
            plain = name.replace("._checkpoint_wrapped_module", "")
            raise ConfigError(
                f"kept_layers={len(kept)}: activation_checkpointing recomputes {plain} as one, with a kept layer in it",
                "fsdp_config: {fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}, or kept_layers: 0",
            )
