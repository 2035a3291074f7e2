"""adapter_config.json: rank, alpha and scaling of a module, as PEFT finds them.

PEFT takes the first key of `rank_pattern` (`alpha_pattern`) that matches the end of a module's path, else `r`
(`lora_alpha`); the scaling is alpha / r, with rsLoRA alpha / sqrt(r) (peft 0.21.2, tuners/lora/model.py and layer.py).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_accel.convert.headers import parse_json
from moe_accel.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "orthogonal", "lora_ga")
"""Initialisations after which an adapter belongs to other base weights than those of the checkpoint."""


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of adapter_config.json that say what the tensors mean. `raw` has all of it."""

    file: Path
    raw: dict[str, Any]

    @property
    def r(self) -> int:
        """The rank where no pattern says otherwise."""
        return self.raw["r"]

    @property
    def alpha(self) -> float:
        """`lora_alpha`, PEFT's default of 8 where it is missing."""
        return self.raw.get("lora_alpha", 8)

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by sqrt(r) (https://arxiv.org/abs/2312.03732)."""
        return bool(self.raw.get("use_rslora"))

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Regular expression of a path's end -> rank."""
        return self.raw.get("rank_pattern") or {}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Regular expression of a path's end -> alpha."""
        return self.raw.get("alpha_pattern") or {}

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Ends of the paths of adapted parameters."""
        return tuple(self.raw.get("target_parameters") or ())

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """Ends of the paths of adapted modules, or one regular expression."""
        found = self.raw.get("target_modules") or ()
        return found if isinstance(found, str) else tuple(found)

    @property
    def version(self) -> tuple[int, ...] | None:
        """`peft_version`, which PEFT writes since 0.18.0, as numbers; None where it is missing."""
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.raw.get("peft_version") or ""))
        return tuple(int(each or 0) for each in found.groups()) if found else None

    def rank_of(self, path: str) -> int:
        """Rank of the module or parameter at `path`."""
        return self.rank_pattern.get(pattern_for(self.rank_pattern, path), self.r)

    def alpha_of(self, path: str) -> float:
        """Alpha of the module or parameter at `path`."""
        return self.alpha_pattern.get(pattern_for(self.alpha_pattern, path), self.alpha)

    def scaling(self, rank: int, alpha: float) -> float:
        """What B @ A is multiplied by."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def pattern_for(patterns: Any, path: str) -> str:
    """The first of `patterns` that PEFT takes for `path`, "" for none."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), "")


def read_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        CheckpointError: it is missing, damaged, or of something else than LoRA.
    """
    file = folder / CONFIG
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        hint = f"PEFT writes it beside {WEIGHTS}; without it rank and alpha are unknown"
        raise CheckpointError(f"{folder} has no {CONFIG}", hint) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    raw = parse_json(file, text, "the adapter's config")
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {str(kind)[:40]!r}; only LORA is understood")
    if type(raw.get("r")) is not int or raw["r"] < 1:
        raise CheckpointError(f"{file}: r must be a positive number, it is {str(raw.get('r'))[:40]}")
    if type(raw.get("lora_alpha", 8)) not in (int, float):
        raise CheckpointError(f"{file}: lora_alpha must be a number, it is {str(raw['lora_alpha'])[:40]}")
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        found = raw.get(key) or {}
        if not isinstance(found, dict) or not all(type(each) in kinds and each > 0 for each in found.values()):
            raise CheckpointError(f"{file}: {key} must map names to positive numbers, it is {str(found)[:80]}")
        for pattern in found:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{file}: {key}: {pattern!r} is no regular expression: {error}") from None
    for key in ("target_parameters", "target_modules"):
        found = raw.get(key) or []
        if not (isinstance(found, list) and all(isinstance(each, str) for each in found)) and not (
            isinstance(found, str) and key == "target_modules"
        ):
            raise CheckpointError(f"{file}: {key} must be a list of names, it is {str(found)[:80]}")
    return AdapterConfig(file, raw)


def refuse_merge(config: AdapterConfig) -> None:
    """Refuse what is no plain W + s B A.

    Raises:
        CheckpointError: DoRA, biases, an initialisation that changed the base weights, and the like; lists all.
    """
    raw = config.raw
    problems = [
        f"{key} is {str(raw[key])[:60]}: {why}"
        for key, why in (
            ("use_dora", "DoRA also rescales the columns of the base weight"),
            ("lora_bias", "the adapter has biases of its own"),
            ("fan_in_fan_out", "weights are stored as (input, output) features"),
            ("use_qalora", "QALoRA pools the input before A"),
            ("alora_invocation_tokens", "aLoRA acts on a part of the tokens only"),
            ("layer_replication", "layers of the base model are repeated"),
            ("trainable_token_indices", "rows of the embedding are trained beside it"),
        )
        if raw.get(key)
    ]
    if raw.get("bias", "none") != "none":
        problems.append(f"bias is {raw['bias']!r}: biases of the base model were trained, too")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        problems.append(f"init_lora_weights is {init!r}: it changed the base weights before training")
    if problems:
        said = "".join(f"\n  - {each}" for each in problems)
        raise CheckpointError(f"{config.file}: cannot be merged as W + s B A:{said}", "merge it with PEFT itself")
