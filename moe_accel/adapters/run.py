"""An adapter from one directory to another, in another dialect."""

from dataclasses import dataclass
from pathlib import Path

from moe_accel.adapters.convert import TARGETS, to_peft, to_per_expert
from moe_accel.adapters.dialect import DIALECTS, NOTHING_SAID, Found, Options, read_experts
from moe_accel.adapters.family import Model, Naming, find_model, naming_of
from moe_accel.adapters.rewrite import others_of, rewrite
from moe_accel.adapters.source import Adapter, open_adapter
from moe_accel.adapters.write import write_adapter
from moe_accel.convert.headers import num_bytes
from moe_accel.convert.layout import Families, load_families
from moe_accel.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    to: str
    base: Path | None = None
    model_type: str | None = None
    options: Options = NOTHING_SAID
    family: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Done:
    """What was converted, or would be."""

    found: Found
    model: Model
    to: str
    num_tensors: int
    num_bytes: int
    passed: tuple[str, ...]
    notes: tuple[str, ...]


def convert_adapter(source: Path, target: Path, request: Request) -> Done:
    """Convert an adapter. Reads the whole file, one layer at a time.

    Raises:
        CheckpointError: the adapter is damaged or ambiguous, or cannot be said in that dialect.
        ConfigError: adapters have no such form, or the family file is wrong.
    """
    if request.to not in TARGETS:
        raise ConfigError(f"{source} holds an adapter; adapters take --to {' or '.join(TARGETS)}, not {request.to}")
    adapter, model, found, naming = read(source, request)
    if not found.experts:
        raise CheckpointError(
            f"{source} adapts no experts: {len(found.others)} tensors, all of them the same in every form",
            "there is nothing to convert",
        )
    assert naming is not None
    done = (to_peft if request.to == "peft" else to_per_expert)(adapter, found, naming)
    notes = list(done.notes)
    _consumed_once(adapter, found)
    config = rewrite(adapter.config, request.to, done.modules, found.others, notes)
    size = sum(num_bytes(each.dtype, each.shape) for each in done.tensors)
    write_adapter(adapter, target, done.tensors, config, request.overwrite, request.dry_run)
    lora = set(others_of(found.others))
    if model.model_type:
        notes.insert(0, f"{model.model_type}, says {model.source}")
    notes.append(f"outside of the experts: {len(lora)} modules with LoRA, {len(found.others)} tensors, unchanged")
    return Done(found, model, request.to, len(done.tensors), size, tuple(found.others), tuple(dict.fromkeys(notes)))


def read(source: Path, request: Request, naming: bool = True) -> tuple[Adapter, Model, Found, Naming | None]:
    """Open an adapter and find what it adapts; no naming where it adapts no experts, or none is wanted."""
    families = load_families(request.family)
    adapter = open_adapter(source)
    model = find_model(adapter.config, request.base, request.model_type)
    found = read_experts(adapter, model, families, request.options)
    return adapter, model, found, naming_for(found, model, families) if found.experts and naming else None


def naming_for(found: Found, model: Model, families: Families) -> Naming:
    """What the experts are called; see `naming_of`."""
    leaves = {
        tensor.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")[0].rpartition(".")[2]
        for each in found.experts
        if each.dialect == "D1"
        for factors in each.factors
        for tensor in factors.tensors
    }
    return naming_of(model, families, [each.path for each in found.experts], leaves)


def _consumed_once(adapter: Adapter, found: Found) -> None:
    used = [name for each in found.experts for factors in each.factors for name in factors.tensors] + found.others
    if sorted(used) != sorted(adapter.tensors):
        twice = sorted({name for name in used if used.count(name) > 1} | (set(adapter.tensors) - set(used)))
        raise CheckpointError(f"{adapter.header.file}: not used exactly once: {', '.join(twice[:4])}")


def describe(dialect: str) -> str:
    """A dialect's key and what it means."""
    return f"{dialect}, {DIALECTS[dialect]}"
