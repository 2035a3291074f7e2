"""Which parameters of a model LoRA is to reach: a `LoraConfig` for any family, and a check of somebody else's.

PEFT's `target_modules` reach `nn.Linear` only. Stacked experts are plain parameters: `target_parameters` reach them. A
name that reaches nothing is passed over by PEFT as long as another one reaches something.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_accel.errors import UnsupportedModelError
from moe_accel.experts.adapters import Adapted
from moe_accel.experts.find import find_experts
from moe_accel.experts.weights import projections
from moe_accel.report import short

NOT_ATTENTION = ("norm.", "hyper_connection.", "indexer.")
"""Parts of a layer with linear layers that mix no tokens, or choose which are mixed: small, and left alone."""
PARTS = {"gate_up_proj": 0, "gate_proj": 0, "up_proj": 0, "w1": 0, "w3": 0, "down_proj": 1, "w2": 1}
"""What experts' projections are called, stacked or not, and whether that is the first or the second."""
HINT = "peft_config = moe_accel.expert_lora_config(model, r=16) names what this model has"


def expert_lora_config(
    model: nn.Module,
    r: int = 16,
    *,
    experts: bool = True,
    attention: bool = True,
    shared_experts: bool = True,
    router: bool = False,
    **options: Any,
) -> Any:
    """A PEFT `LoraConfig` for a mixture of experts of transformers.

    Args:
        model: not yet wrapped by PEFT.
        r: rank, of each expert's adapter too.
        experts: adapt the routed experts.
        attention: adapt the linear layers of attention (or whatever mixes tokens) and of dense layers between.
        shared_experts: adapt what every token passes through beside the routed experts.
        router: adapt the router as well. Fine-tuning seldom gains by it.
        options: of `LoraConfig`; `lora_alpha` is 2 r where not given, `task_type` is CAUSAL_LM.

    Raises:
        UnsupportedModelError: the model has no experts that can be adapted, or nothing is asked for.
    """
    from peft import LoraConfig

    found = find_experts(model)
    wanted = {"attention": attention, "shared_experts": shared_experts, "router": router}
    linear = [name for kind, name in _linear_layers(model, found) if wanted[kind]]
    modules = _short([name for name in linear if not _renamed(name)], [name for name, _ in model.named_modules()])
    parameters = [f"{name}.weight" for name in linear if _renamed(name)]
    if router:
        parameters += [f"{name}.weight" for name in _routers(model, found) if name not in linear]
    if experts:
        parameters += [f"{name}.{each}" for name, module in found for each in projections(module)]
    parameters = _short(parameters, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    if not parameters and not modules:
        raise UnsupportedModelError(f"{type(model).__name__}: nothing of what was asked for can have an adapter", HINT)
    given = {"lora_alpha": 2 * r} | options
    if hasattr(model, "prepare_inputs_for_generation"):
        given = {"task_type": "CAUSAL_LM"} | given
    return LoraConfig(r=r, target_modules=modules, target_parameters=parameters or None, **given)  # pyright: ignore


def _renamed(name: str) -> bool:
    """Whether PEFT 0.21 would take a target of this name for an expert's projection of the time before experts were
    stacked, and adapt the stack instead. As a parameter, `name.weight`, it is left alone."""
    return name.rpartition(".")[2] in ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def _short(names: list[str], all_names: list[str]) -> list[str]:
    """The names within their layers, `mlp.experts.down_proj`, where PEFT finds no other by these; else whole names."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(_in_layer(name), set()).add(name)
    reached = {path: {each for each in all_names if f".{each}".endswith(f".{path}")} for path in found}
    return sorted({short for path, of in found.items() for short in ([path] if reached[path] == of else of)})


def _in_layer(name: str) -> str:
    """A module's name from its layer's number on: `model.layers.3.mlp.experts` -> `mlp.experts`."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def _linear_layers(model: nn.Module, experts: list[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """(`attention`, `shared_experts` or `router`, name) of the linear layers of layers with experts.

    A layer is what lies under a number in a list that also holds experts. What stands beside the experts in their
    parent is the router where it is called so or has one row for each expert, and a shared expert else; what gates it
    with one output is neither.
    """
    lists = {re.sub(r"\d+\.(?!.*\d+\.).*", "", name) for name, _ in experts}
    parents = {name.rpartition(".")[0]: module.num_experts for name, module in experts}
    for name, module in model.named_modules():
        in_layer = any(each and name.startswith(each) for each in lists)
        if type(module).forward is not nn.Linear.forward or not in_layer or any(part in name for part in NOT_ATTENTION):
            continue
        if any(name.startswith(f"{each}.") for each, _ in experts):
            continue
        parent = next((each for each in parents if name.startswith(f"{each}.")), None)
        if parent is None:
            if not (name.endswith("out_proj") and hasattr(model.get_submodule(name.rpartition(".")[0]), "conv1d")):
                yield "attention", name  # PEFT refuses Mamba's: a fused kernel reads its weight
            continue
        child = name.removeprefix(f"{parent}.").split(".")[0]
        if child in ("gate", "router") or parents[parent] in _rows(model.get_submodule(f"{parent}.{child}")):
            yield "router", name
        elif module.out_features != 1:
            yield "shared_experts", name


def _rows(module: nn.Module) -> set[int]:
    return {parameter.shape[0] for parameter in module.parameters() if parameter.ndim == 2}


def _routers(model: nn.Module, experts: list[tuple[str, Any]]) -> Iterator[str]:
    """Names of the modules whose weight has one row for each expert, beside the experts."""
    for name, module in experts:
        parent = name.rpartition(".")[0]
        for own, each in model.get_submodule(parent).named_modules():
            weight = each._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] == module.num_experts:
                yield f"{parent}.{own}"


def told_of_adapters(model: nn.Module, experts: list[tuple[str, Any]], adapted: list[Adapted]) -> list[str]:
    """Lines for the report: how many experts of how many layers are adapted.

    Raises:
        UnsupportedModelError: adapters were asked for on experts, and some experts have none that is trained.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return []
    for adapter, config in configs.items():
        _refuse_unreached(model, experts, adapted, adapter, config)
    frozen = [each.name for each in adapted if not each.trainable]
    if frozen and any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{frozen[0]}: its adapters are frozen, while other parameters of the model are trained",
            "PeftModel.from_pretrained(..., is_trainable=True), or model.set_adapter(name)",
        )
    whole = [name for name, _ in experts if ".modules_to_save." in name]
    if whole:
        return [f"the experts of {len(whole)} of {len(experts)} layers are trained whole: modules_to_save"]
    if not adapted:
        return ["no adapter on the routed experts; moe_accel.expert_lora_config(model) makes a LoraConfig with them"]
    ranks = {
        f"{parameter} r {rank}" for each in adapted for parameter, of in each.ranks.items() for rank in of.values()
    }
    counts = " or ".join(map(str, sorted({each.num_experts for each in adapted})))
    size = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)
    said = f"LoRA on {counts} experts of {len(adapted)} of {len(experts)} layers: {', '.join(sorted(ranks))}; "
    return [f"{said}{short(size)} parameters of all adapters are trained"]


def _refuse_unreached(
    model: nn.Module, experts: list[tuple[str, Any]], adapted: list[Adapted], adapter: str, config: Any
) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    names = {_plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {f"{_plain(name)}.{each}" for name, module in experts for each in projections(module)}
    for target in getattr(config, "target_parameters", None) or ():
        if not any(_ends(name, target) for name in names):
            raise UnsupportedModelError(
                f"adapter {adapter!r}: target_parameters names {target!r}, which no parameter of the model is called",
                HINT,
            )
    targets = getattr(config, "target_modules", None) or ()
    if not isinstance(targets, str):
        modules = [_plain(name) for name, _ in model.named_modules()]
        targets = sorted(each for each in targets if not any(_ends(name, each) for name in modules))
    with_adapter = {(each.name, of) for each in adapted for of, ranks in each.ranks.items() if adapter in ranks}
    for name, module in experts:
        for target, key in _names_of_experts(targets, _plain(name), module):
            part = PARTS.get(key.rpartition(".")[2])
            meant = projections(module) if part is None else (projections(module)[part],)
            if any((name, each) in with_adapter for each in meant) or not check_target_module_exists(config, key):
                continue
            raise UnsupportedModelError(
                f"adapter {adapter!r}: target_modules names {target!r}, but {_plain(name)} has stacked parameters, "
                "which target_modules does not reach: they would stay as they are",
                HINT,
            )


def _names_of_experts(targets: Any, experts: str, module: Any) -> Iterator[tuple[str, str]]:
    """Names below an experts module that a config may mean by `target_modules`: (target, name).

    A regular expression is tried on all names that projections have, stacked or one module per expert, if it speaks of
    experts: `.*_proj` does not. A target of a list means experts where it begins with a name of theirs, or is what one
    of their parameters is called.
    """
    if isinstance(targets, str):
        if re.search(rf"(?<!_){re.escape(experts.rpartition('.')[2])}", targets):
            for part in PARTS:
                yield targets, f"{experts}.{part}"
                yield from ((targets, f"{experts}.{each}.{part}") for each in range(module.num_experts))
        return
    for target in targets:
        words = target.split(".")
        starts = (count for count in range(1, len(words) + 1) if _ends(experts, ".".join(words[:count])))
        count = next(starts, 0)
        if count or target in projections(module):
            yield target, ".".join([experts, *words[count:]])


def _ends(name: str, target: str) -> bool:
    """Whether a target of a list means a name, as PEFT has it."""
    return f".{name}".endswith(f".{target}")


def _plain(name: str) -> str:
    """A name as it was before PEFT wrapped what it names."""
    return name.replace("_orig_mod.", "").replace(".base_layer", "").removeprefix("base_model.model.")
