"""Which model an adapter belongs to, and what its experts are called: the tables of `converters/`, read for adapters.

An adapter says neither whether gate and up rows are interleaved nor what the hub calls an expert's matrices. The
model_type does, and it is looked for where it can stand: the option, the base model's config.json, `auto_mapping` in
adapter_config.json, the local directory or Hugging Face cache that `base_model_name_or_path` names.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_accel.adapters.config import AdapterConfig
from moe_accel.convert.headers import parse_json
from moe_accel.convert.layout import ExpertLayout, Families, Family
from moe_accel.errors import CheckpointError

HINT = "--base DIR (a directory with the base model's config.json) or --model-type TYPE says which model it is for"
LEAVES: Mapping[str, tuple[str, ...]] = {
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w3": ("up",),
    "w2": ("down",),
    "gate_up_proj": ("gate", "up"),
}
"""Names of a projection below `experts`, and the roles it has."""


@dataclass(frozen=True)
class Model:
    """What is known of the base model.

    Attributes:
        model_type: from config.json; None: unknown.
        source: where it stands.
        hidden: `hidden_size`; None: unknown.
        types: every model_type in config.json: the model's, and that of the text model in it.
    """

    model_type: str | None
    source: str
    hidden: int | None = None
    types: tuple[str, ...] = ()


def find_model(config: AdapterConfig, base: Path | None = None, model_type: str | None = None) -> Model:
    """The base model of an adapter, from the first place that names it.

    Raises:
        CheckpointError: `base` has no config.json, it is damaged, or says another type than `model_type`.
    """
    if base is not None:
        found = _read_base(base)
        if found is None:
            raise CheckpointError(f"{base} has no config.json", "give the directory of the base model")
        if model_type and found.model_type and model_type not in found.types:
            said = f"--model-type {model_type} contradicts {found.source}, which says {found.model_type}"
            raise CheckpointError(said, "leave out --model-type, or give the directory of another base model")
        return Model(model_type or found.model_type, found.source, found.hidden)
    if model_type:
        return Model(model_type, "--model-type")
    named = config.raw.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for folder in _places(named):
            found = _read_base(folder)
            if found is not None and found.model_type:
                return found
    library = (config.raw.get("auto_mapping") or {}).get("parent_library")
    match = re.match(r"transformers\.models\.(\w+)\.", library) if isinstance(library, str) else None
    if match:
        return Model(match[1], "auto_mapping of adapter_config.json")
    return Model(
        None, f"base_model_name_or_path {named!r} is not on this machine" if named else "no base model is named"
    )


def _places(named: str) -> Iterator[Path]:
    yield Path(named)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        yield from sorted((hub / f"models--{named.replace('/', '--')}" / "snapshots").glob("*"))


def _read_base(folder: Path) -> Model | None:
    file = folder / "config.json"
    try:
        config = parse_json(file, file.read_bytes(), "the config")
    except OSError:
        return None
    return model_of(config, str(file))


def model_of(config: Mapping[str, Any], source: str) -> Model:
    """What a config.json says: of the text model, where there are several."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    hidden = text.get("hidden_size") or config.get("hidden_size")
    types = tuple(each for part in (config, text) if isinstance(each := part.get("model_type"), str) and each)
    return Model(types[0] if types else None, source, hidden if type(hidden) is int else None, types)


@dataclass(frozen=True)
class Naming:
    """What the model's experts are called one by one (`per_expert`), and how transformers holds them (`stacked`)."""

    family: Family
    per_expert: ExpertLayout
    stacked: ExpertLayout

    @property
    def order(self) -> str:
        """How gate and up share the rows of a parameter: `gate-up`, `up-gate` or `interleaved`."""
        return self.stacked.order

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return "gate" in self.stacked.roles

    @property
    def swapped(self) -> bool:
        """Whether PEFT swaps A and B on these experts, even today."""
        return self.family.peft == "swapped"

    def expert(self, layer: str, block: str, role: str, expert: int) -> str:
        """Path of one matrix, as vLLM, SGLang and llama.cpp know it."""
        pattern = next(slot.pattern for slot in self.per_expert.slots if slot.roles == (role,))
        moe = _moe(layer, block, self.per_expert)
        return (
            pattern.replace("{moe}", moe).replace("{layer}", layer).replace("{e}", str(expert)).removesuffix(".weight")
        )

    def experts(self, layer: str, block: str) -> str:
        """Path of the experts module in transformers."""
        return _moe(layer, block, self.stacked) + ".experts"

    @property
    def facts(self) -> tuple[object, ...]:
        """Two of a kind write the same files."""
        return self.order, self.gated, self.swapped, self.per_expert.slots, self.per_expert.blocks, self.stacked.blocks


def _moe(layer: str, block: str, layout: ExpertLayout) -> str:
    blocks = layout.blocks
    block = block if blocks is None or block in blocks else blocks[0]
    return f"{layer}.{block}" if block else layer


def split_path(path: str) -> tuple[str, str]:
    """Layer and block of an experts module: `model.layers.3`, `mlp` of `model.layers.3.mlp.experts`."""
    match = re.fullmatch(r"(?P<layer>(?:.+\.)?\d+)(?:\.(?P<block>.+?))?\.experts", path)
    if match is None:
        raise CheckpointError(f"{path} is in no numbered layer")
    return match["layer"], match["block"] or ""


def naming_of(model: Model, families: Families, paths: Iterable[str], leaves: Iterable[str]) -> Naming:
    """How the experts at `paths` are named, given the names below them that the adapter uses.

    Raises:
        CheckpointError: the model is unknown and the names leave several possibilities.
    """
    blocks = {split_path(path)[1] for path in paths}
    leaves = set(leaves) - {"gate_up_proj"}
    known = families.of(model.model_type)
    if known is not None:
        found = _naming(known)
        if found is None:
            raise CheckpointError(f"experts of {model.model_type} cannot be named one by one: {known.about}")
        return found
    possible = [each for family in families.families if (each := _naming(family)) and _fits(each, blocks, leaves)]
    if not possible:
        raise CheckpointError(
            f"no family has experts under {', '.join(sorted(blocks))} ({', '.join(sorted(leaves))})", HINT
        )
    kinds = {each.facts: each for each in reversed(possible)}
    if len(kinds) > 1 and model.model_type is None:
        names = ", ".join(each.family.name for each in kinds.values())
        raise CheckpointError(
            f"the file does not say which model it is for ({model.source}); names of experts and the order of gate and "
            f"up differ between {names}",
            HINT,
        )
    return possible[0] if len(kinds) == 1 else next((p for p in possible if p.family.default), possible[0])


def _naming(family: Family) -> Naming | None:
    per_expert, stacked = family.layouts.get("per-expert"), family.layouts.get("stacked")
    if per_expert is None or stacked is None or not all("{moe}.experts." in s.pattern for s in per_expert.slots):
        return None
    return Naming(family, per_expert, stacked)


def _fits(naming: Naming, blocks: set[str], leaves: set[str]) -> bool:
    own = {slot.pattern.removesuffix(".weight").rpartition(".")[2] for slot in naming.per_expert.slots}
    own |= {slot.pattern.rpartition(".")[2] for slot in naming.stacked.slots}
    blocks_of = [layout.blocks for layout in (naming.per_expert, naming.stacked)]
    return leaves <= own and all(any(of is None or block in of for of in blocks_of) for block in blocks)
