"""Which modules of a model are experts, and why a model is refused."""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from torch import nn

from moe_accel.errors import UnsupportedModelError


def find_experts(model: nn.Module) -> list[tuple[str, Any]]:
    """The experts modules that transformers lets an experts function replace, with their names.

    Raises:
        UnsupportedModelError: there are none, or the model also has experts that no experts function can reach.
    """
    refused = {entry["experts_class"]: entry for entry in undecorated_families()}
    found, undecorated = [], {}
    for name, module in model.named_modules():
        class_name = type(module).__name__.removeprefix("FSDP")
        if is_decorated(module):
            found.append((name, module))
        elif class_name in refused and type(module).__module__.startswith("transformers."):
            undecorated.setdefault(class_name, name)
    for class_name in undecorated:
        entry = refused[class_name]
        raise UnsupportedModelError(
            f"{type(model).__name__}: the experts of {entry['family']} ({class_name}) cannot be replaced: "
            f"{entry['reason']}",
            entry["possible"],
        )
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no mixture of experts that transformers lets an experts function replace",
            "remove moe_config to train a dense model; a class of your own needs transformers' "
            "@use_experts_implementation on its experts",
        )
    return found


def computing(model: nn.Module, experts: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Those of `experts` that compute now: of a module and PEFT's copies of it (`modules_to_save`) only one does."""
    idle: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__.removeprefix("FSDP") != "ModulesToSaveWrapper":
            continue
        wrapper: Any = module
        copies = dict(wrapper.modules_to_save.items())
        active = (
            [] if wrapper.disable_adapters else [copies[each] for each in wrapper.active_adapters if each in copies]
        )
        used = active[0] if active else wrapper.original_module
        for part in (wrapper.original_module, *copies.values()):
            if part is not used:
                idle.update(part.modules())
    return [(name, module) for name, module in experts if module not in idle]


def has_experts(model: nn.Module) -> bool:
    """Whether any module of the model is an experts module that can be replaced; raises nothing."""
    return any(is_decorated(module) for module in model.modules())


def is_decorated(module: nn.Module) -> bool:
    """Whether the module's class has transformers' `@use_experts_implementation`."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


@cache
def undecorated_families() -> list[dict[str, str]]:
    """The entries of families.toml."""
    text = (resources.files("moe_accel.experts") / "families.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["undecorated"]


def expert_parameter_counts(experts: list[tuple[str, Any]]) -> Iterator[tuple[int, bool]]:
    """Number of elements and requires_grad of every parameter of the experts."""
    for _, module in experts:
        for parameter in module.parameters():
            yield parameter.numel(), parameter.requires_grad
