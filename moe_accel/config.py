"""The `moe_config` section: its keys, their values, and every rule that needs no torch to check.

`MoEConfig`, the object accelerate carries, is in `parallelism.py`; it needs accelerate and so torch. This file is what
the launcher, the autoload and the CLI use.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moe_accel.errors import ConfigError

ENV_VAR = "MOE_ACCEL_CONFIG"
"""Environment variable that carries the section to the workers: JSON, or the path of a yaml or JSON file."""

SECTION = "moe_config"
DISPATCHERS = ("auto", "alltoall", "deepep")
KERNELS = ("auto", "reference", "fused", "te")
TE_PARTS = ("experts", "permutation", "router", "norms", "attention", "fp8")
"""What `kernels: te` may let TransformerEngine compute."""
SAVE_LAYOUTS = ("per-expert", "stacked")
PADDING_FREE = ("auto", "off")


@dataclass(frozen=True)
class MoEOptions:
    """The options of `moe_config`.

    Attributes:
        ep_size: ranks that share one set of experts; divides both the number of experts and the data-parallel ranks.
        dispatcher: transport of tokens to experts: `auto`, `alltoall` or `deepep`. Unused at ep_size 1.
        kernels: how a rank computes its experts: `auto`, `reference` (a slow, true loop), `fused` or `te`.
        dp_replicate_size: HSDP replicas; None leaves it to accelerate's own `parallelism_config` section.
        kept_layers: last layers that gradient checkpointing leaves out, each for memory, to save a recompute: a number,
            or `auto`, as many as the GPU has memory for, measured in the first steps.
        save_layout: of saved models: `per-expert`, as `save_pretrained` writes for the hub, or `stacked`, as in memory.
        async_save: write periodic checkpoints while training goes on, from a copy in host memory.
        padding_free: compute no padding in training where that changes no number (`auto`), or `off`.
        te_parts: what TransformerEngine computes under `kernels: te`, some of `TE_PARTS`; the rest is as `fused`.
        cuda_graphs: record attention, and in expert parallelism blocks with experts, as CUDA graphs, for training with
            sequences of one length where the host is what takes the time; or `attention` alone.
    """

    ep_size: int = 1
    dispatcher: str = "auto"
    kernels: str = "auto"
    dp_replicate_size: int | None = None
    kept_layers: int | str = 0
    save_layout: str = "per-expert"
    async_save: bool = False
    padding_free: str = "auto"
    te_parts: Sequence[str] = ("experts",)
    cuda_graphs: bool | str = False

    def __post_init__(self) -> None:
        if isinstance(self.te_parts, list):  # of yaml and JSON
            object.__setattr__(self, "te_parts", tuple(self.te_parts))

    def problems(self) -> list[str]:
        """Every rule broken by the values alone, as sentences; empty when there is none."""
        found = []
        for name, least in (("ep_size", 1), ("dp_replicate_size", 1), ("kept_layers", 0)):
            value = getattr(self, name)
            if value is None and name == "dp_replicate_size":
                continue
            if value == "auto" and name == "kept_layers":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                or_auto = " or auto" if name == "kept_layers" else ""
                found.append(f"{name}={value!r} must be a whole number{or_auto}")
            elif value < least:
                found.append(f"{name}={value} must be at least {least}")
        words = {
            "dispatcher": DISPATCHERS,
            "kernels": KERNELS,
            "save_layout": SAVE_LAYOUTS,
            "padding_free": PADDING_FREE,
        }
        for name, allowed in words.items():
            value = getattr(self, name)
            if name == "padding_free" and value is False:  # what yaml makes of a plain `off`
                continue
            if value not in allowed:
                found.append(f"{name}={value!r} must be one of {', '.join(allowed)}{_did_you_mean(value, allowed)}")
        for name, words in (("async_save", ()), ("cuda_graphs", ("attention",))):
            value = getattr(self, name)
            if not isinstance(value, bool) and value not in words:
                *first, last = "true", "false", *words
                found.append(f"{name}={value!r} must be {', '.join(first)} or {last}{_did_you_mean(value, words)}")
        return found + list(self._problems_of_parts())

    def _problems_of_parts(self) -> Iterator[str]:
        parts = self.te_parts
        if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
            shown = list(parts) if isinstance(parts, tuple) else parts
            yield f"te_parts={shown!r} must be a list of some of {', '.join(TE_PARTS)}"
            return
        for part in parts:
            if part not in TE_PARTS:
                near = _did_you_mean(part, TE_PARTS)
                yield f"te_parts has {part!r}, which must be one of {', '.join(TE_PARTS)}{near}"
        if len(set(map(str, parts))) < len(parts):
            yield f"te_parts={list(parts)} names one twice"
        if tuple(parts) != ("experts",) and self.kernels != "te":
            yield f"te_parts={list(parts)} needs kernels: te, not {self.kernels!r}"

    def to_json(self) -> str:
        """The options as the one-line JSON that `MOE_ACCEL_CONFIG` holds."""
        return json.dumps(asdict(self))


OPTION_NAMES = tuple(field.name for field in fields(MoEOptions))


def parse_section(section: Any, where: str = SECTION) -> MoEOptions:
    """Turn a `moe_config` mapping into options.

    Raises:
        ConfigError: with every unknown key (and the key probably meant) and every bad value at once.
    """
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{where} must be a section of key: value lines, not {type(section).__name__} {section!r}",
            f"for example\n{SECTION}:\n  ep_size: 8",
        )
    unknown = [key for key in section if key not in OPTION_NAMES]
    problems = [f"unknown key {key!r}{_did_you_mean(str(key), OPTION_NAMES)}" for key in unknown]
    options = MoEOptions(**{key: value for key, value in section.items() if key in OPTION_NAMES})
    problems += options.problems()
    if problems:
        hint = f"the keys are {', '.join(OPTION_NAMES)}" if unknown else None  # values say themselves what they may be
        raise ConfigError.collect(problems, where, hint)
    return options


def check_launch(options: MoEOptions, config: Mapping[str, Any], where: str, arguments: Sequence[str] = ()) -> None:
    """Check an accelerate config against the options that stand in it.

    A setting that `arguments` (the command line) may override is left for the training processes to check.

    Raises:
        ConfigError: with everything in `config` that makes `options` impossible, and the lines to write instead.
    """
    if options.ep_size == 1:
        return
    given = {name.split("=")[0].lstrip("-").replace("-", "_") for name in arguments if name.startswith("--")}
    problems, remedies = [], []
    distributed = config.get("distributed_type")
    distributed = getattr(distributed, "value", distributed)
    if distributed != "FSDP" and not given & {"use_fsdp", "use_deepspeed", "use_megatron_lm", "cpu"}:
        problems.append(f"ep_size={options.ep_size} needs distributed_type FSDP, not {distributed}")
        remedies.append("distributed_type: FSDP")
    fsdp = config.get("fsdp_config")
    fsdp = fsdp if isinstance(fsdp, Mapping) else {}
    version = fsdp.get("fsdp_version", fsdp.get("version"))
    if str(version) != "2" and "fsdp_version" not in given:
        shown = "1, accelerate's default" if version is None else version
        problems.append(f"ep_size={options.ep_size} needs FSDP version 2, not {shown}")
        remedies.append("fsdp_config: {fsdp_version: 2}")
    ranks = config.get("num_processes")
    if isinstance(ranks, int) and ranks > 0 and ranks % options.ep_size and "num_processes" not in given:
        fitting = [size for size in range(1, ranks + 1) if ranks % size == 0]
        problems.append(f"ep_size={options.ep_size} must divide num_processes={ranks}")
        remedies.append(f"ep_size: {max(size for size in fitting if size < options.ep_size)}  # any of {fitting}")
    if problems:
        raise ConfigError.collect(problems, where, "\n".join(["in the config file write", *remedies]))


def read_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a yaml or JSON config file into a dict.

    Raises:
        ConfigError: the file is missing, unreadable or not a mapping.
    """
    import yaml

    file = Path(path)
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid yaml or JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold a mapping of sections, not {type(loaded).__name__}")
    return loaded


def is_path(value: str) -> bool:
    """Whether a value of `MOE_ACCEL_CONFIG` names a file, rather than being JSON or empty."""
    return bool(value.strip()) and not value.strip().startswith("{")


def parse_env(value: str) -> MoEOptions:
    """Parse the value of `MOE_ACCEL_CONFIG`: the section as JSON, or the path of a file that holds it.

    A file may be a whole accelerate config with a `moe_config` section, or the section alone.

    Raises:
        ConfigError: neither valid JSON nor a readable file, or the section is wrong.
    """
    text = value.strip()
    if not is_path(text):
        try:
            return parse_section(json.loads(text), ENV_VAR)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{ENV_VAR} is not valid JSON: {error}") from None
    loaded = read_config_file(text)
    if SECTION in loaded:
        return parse_section(loaded[SECTION], f"{text}: {SECTION}")
    if not any(key in OPTION_NAMES for key in loaded):
        raise ConfigError(f"{text} has no {SECTION} section", f"add\n{SECTION}:\n  ep_size: 8")
    return parse_section(loaded, text)


def _did_you_mean(word: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
