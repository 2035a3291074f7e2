"""adapter_config.json for the other dialect: targets, ranks and alphas that say of the new tensors what they were."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moe_accel.adapters.config import PREFIX, AdapterConfig, pattern_for
from moe_accel.adapters.convert import Module, tidy
from moe_accel.errors import CheckpointError

LAYOUT_SINCE = "0.19.1"
"""The first PEFT that writes stacked experts as we do."""


def others_of(names: Iterable[str]) -> list[str]:
    """Paths of the modules that have LoRA and are no experts."""
    found = (re.match(r"(.+?)\.lora_(?:embedding_)?[AB]\b", name.removeprefix(PREFIX)) for name in names)
    return list(dict.fromkeys(match[1].removesuffix(".base_layer") for match in found if match))


def rewrite(
    config: AdapterConfig, target: str, modules: Iterable[Module], others: Iterable[str], notes: list[str]
) -> dict[str, Any]:
    """The config of the converted adapter.

    Args:
        config: of the source.
        target: `peft` or `per-expert`.
        modules: the adapted experts, as they are now.
        others: names of the tensors that are no experts' factors.
        notes: told what changed its meaning on the way.

    Raises:
        CheckpointError: to per-expert, where one alpha / r cannot be said for all modules.
    """
    modules, dense = list(modules), others_of(others)
    raw = {key: value for key, value in config.raw.items() if key not in ("lora_B_layout", "target_parameters")}
    raw["target_modules"] = _target_modules(config, dense)
    if target == "per-expert":
        _one_scaling(config, modules, dense, raw, notes)
        raw["target_modules"] = sorted({*raw["target_modules"], *(each.leaf for each in modules)})
        kept = [each for each in config.target_parameters if not _names_experts(each)]
        raw["target_parameters"] = kept or None
    else:
        raw["target_parameters"] = _target_parameters(config, modules)
        if config.version is None or config.version < (0, 19, 1):
            raw["peft_version"] = LAYOUT_SINCE  # else the next reader would take it for a file of that time
        clash = sorted(
            {path.rpartition(".")[2] for path in dense} & {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
        )
        if clash:
            notes.append(
                f"{', '.join(clash)} outside of the experts (shared experts, dense layers) are kept; PEFT 0.21 takes "
                "these names for the experts' where it loads adapters, and then refuses or drops them"
            )
    raw["rank_pattern"], raw["alpha_pattern"] = _patterns(config, raw, target, modules, dense)
    return raw


def _names_experts(target: str) -> bool:
    return target.rpartition(".")[2] in ("gate_up_proj", "up_proj", "down_proj") and "experts" in target.split(".")


def _target_modules(config: AdapterConfig, dense: list[str]) -> list[str]:
    """The names that modules outside of the experts need."""
    given = config.target_modules
    if isinstance(given, str):
        return sorted({path.rpartition(".")[2] for path in dense})
    return [each for each in given if any(path == each or path.endswith(f".{each}") for path in dense)]


def _target_parameters(config: AdapterConfig, modules: list[Module]) -> list[str]:
    """The names of experts' parameters: short where every adapted layer has the same ones."""
    kept = list(config.target_parameters)
    paths = [f"{each.path}.{each.leaf}" for each in modules]
    if paths and all(any(path == each or path.endswith(f".{each}") for each in kept) for path in paths):
        return kept
    leaves: dict[str, set[str]] = {}
    for each in modules:
        leaves.setdefault(each.path, set()).add(each.leaf)
    same = len({tuple(sorted(each)) for each in leaves.values()}) == 1 and not config.raw.get("layers_to_transform")
    kept = [each for each in kept if not _names_experts(each)]
    if not same:
        return kept + paths
    return kept + list(dict.fromkeys(re.sub(r"^.*\d+\.", "", path) for path in paths))


def _one_scaling(
    config: AdapterConfig, modules: list[Module], dense: list[str], raw: dict[str, Any], notes: list[str]
) -> None:
    """Serving engines know one alpha / r and no rsLoRA for experts: say it that way, or refuse."""
    ranks = {f"{each.path}.*.{each.leaf}": (each.rank, each.alpha) for each in modules}
    ranks |= {path: (config.rank_of(path), config.alpha_of(path)) for path in dense}
    scalings = {path: config.scaling(*each) for path, each in ranks.items()}
    by_value: dict[float, str] = {}
    for path, value in scalings.items():
        if not any(abs(value - other) <= 1e-9 * abs(value) for other in by_value):
            by_value[value] = path
    if len(by_value) > 1:
        said = "; ".join(f"{value:g} for {path}" for value, path in list(by_value.items())[:4])
        raise CheckpointError(
            f"{config.file}: adapters of this form have one scaling for all modules, as vLLM, SGLang and llama.cpp "
            f"read no patterns; this one has {said}",
            "--to peft keeps patterns; moe-accel merge applies them",
        )
    several = [rank for rank, _ in ranks.values()]
    common = config.r if config.r in several else max(several, key=several.count)
    scaling = next(iter(by_value))
    raw["r"], raw["lora_alpha"] = common, tidy(scaling * common)
    if config.rslora:
        raw["use_rslora"] = False
        notes.append(
            f"rsLoRA written as plain LoRA with the same scaling, lora_alpha {raw['lora_alpha']:g}: vLLM and SGLang "
            "read alpha / r for experts whatever use_rslora says"
        )


def _patterns(
    config: AdapterConfig, raw: Mapping[str, Any], target: str, modules: list[Module], dense: list[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern of the new config."""
    plain = AdapterConfig(config.file, dict(raw))
    ranks = _pattern(
        plain.r,
        {(each.path, each.leaf): each.rank for each in modules},
        {path: config.rank_of(path) for path in dense},
        config.rank_pattern,
        target,
    )
    if target == "peft":
        expected = {(each.path, each.leaf): each.alpha for each in modules}
        alphas = {path: config.alpha_of(path) for path in dense}
        return ranks, _pattern(plain.alpha, expected, alphas, config.alpha_pattern, target)
    scaling = plain.alpha / plain.r  # the same for all: alpha follows the rank, under the same keys
    return ranks, {key: tidy(scaling * rank) for key, rank in ranks.items()}


def _pattern(
    default: Any, experts: dict[tuple[str, str], Any], dense: dict[str, Any], old: Mapping[str, Any], target: str
) -> dict[str, Any]:
    """Entries that give every module its value. Experts come first, as PEFT takes the first entry that matches."""
    kept = {key: value for key, value in old.items() if any(pattern_for([key], path) for path in dense)}
    for path, value in dense.items():
        if kept.get(pattern_for(kept, path), default) != value:
            kept = {re.escape(path): value, **kept}
    by_leaf: dict[str, set[Any]] = {}
    for (_, leaf), value in experts.items():
        by_leaf.setdefault(leaf, set()).add(value)
    found: dict[str, Any] = {}
    inside, example = (r"\.\d+\.", ".0.") if target == "per-expert" else (r"\.", ".")
    for (path, leaf), value in experts.items():
        if value != default or pattern_for(kept, f"{path}{example}{leaf}"):
            where = "experts" if len(by_leaf[leaf]) == 1 else re.escape(path)
            found[f"{where}{inside}{leaf}"] = value
    return found | kept
