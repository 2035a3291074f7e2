"""What a merge adds where: every factor of the adapter matched with a matrix of the checkpoint, on headers alone.

Experts are matched by layer, number and role, whatever the two layouts are; everything else by name, or by the name it
has in another layout of the family. What matches nothing is an error: no part of an adapter is left out silently.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from moe_accel.adapters.config import PREFIX, AdapterConfig, refuse_merge
from moe_accel.adapters.convert import Cache
from moe_accel.adapters.dialect import NOTHING_SAID, Found, Options, read_experts
from moe_accel.adapters.factors import Array, Factors, rows_of
from moe_accel.adapters.family import model_of
from moe_accel.adapters.numbers import to_floats
from moe_accel.adapters.run import naming_for
from moe_accel.adapters.source import FLOATS, Adapter
from moe_accel.convert.layout import Families, ranges
from moe_accel.convert.plan import aliases, make_plan, parts
from moe_accel.convert.regions import Plan, Region, Tensor, whole_output
from moe_accel.convert.source import Checkpoint
from moe_accel.errors import CheckpointError

QUANTISED = "moe-accel convert DIR OUT --to stacked --dequantize bf16 first"
_DENSE = re.compile(r"(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(?:\.default)?(?P<weight>\.weight)?")


@dataclass(frozen=True)
class Addition:
    """s B A for one matrix. `role`: under which it is reported; `factors`: values of A [r, in] and B [out, r]."""

    name: str
    role: str
    scaling: float
    out_features: int
    in_features: int
    factors: Callable[[], tuple[Array, Array]]


@dataclass(frozen=True)
class Item:
    """One matrix of an output: where it is read, where it goes, what is added (None: nothing)."""

    source: Region
    target: Region
    expert: int
    addition: Addition | None


@dataclass
class MergePlan:
    """A merge: tensors to write, of which `merged` are computed and `replaced` come from the adapter."""

    plan: Plan
    merged: dict[str, list[Item]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_factors: int = 0


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """A delta cannot be added to numbers that are codes.

    Raises:
        CheckpointError: config.json says that the checkpoint is quantised.
    """
    nested = checkpoint.config.get("text_config")
    for config in (checkpoint.config, nested if isinstance(nested, dict) else {}):
        if config.get("quantization_config"):
            method = (config["quantization_config"] or {}).get("quant_method", "some way")
            raise CheckpointError(
                f"{checkpoint.folder} is quantised ({method}): a delta cannot be added to its weights", QUANTISED
            )


def plan_merge(
    checkpoint: Checkpoint,
    adapter: Adapter,
    to: str | None,
    families: Families,
    options: Options = NOTHING_SAID,
) -> MergePlan:
    """Match an adapter with its base. Reads headers, and lora_B where its layout is in doubt.

    Args:
        checkpoint: the base, in any layout.
        adapter: from `open_adapter`, in any dialect.
        to: layout to write; None: as the base is.
        families: from `load_families`.
        options: what the user said about the adapter.

    Raises:
        CheckpointError: a factor has no matrix or one of another shape, the base is quantised, or the adapter is more
            than W + s B A. Lists the first problems.
    """
    refuse_merge(adapter.config)
    refuse_quantised(checkpoint)
    model = model_of(checkpoint.config, str(checkpoint.folder / "config.json"))
    found = read_experts(adapter, model, families, options)
    source = parts(checkpoint.tensors, families, model.model_type)
    regions = {(each.layer, each.role, each.expert): each.region for each in source if each.expert >= 0}
    notes = list(found.notes)
    if to is None:
        plan = Plan(tuple(whole_output(each, each.name) for each in checkpoint.tensors.values()), (), (), ())
    else:
        plan = make_plan(checkpoint.tensors, to, families, model.model_type)
        notes += plan.notes
    problems: list[str] = []
    dense, full = _sort(adapter, found.others, problems)
    rename = _renaming(checkpoint, found, dense, regions, notes)
    wanted = _expert_additions(found, families, model, rename, regions, checkpoint, problems)
    names = aliases(checkpoint.tensors, families, model.model_type) if dense or full else {}
    locate = partial(_locate, checkpoint.tensors, names, rename)
    additions = _dense_additions(adapter, dense, locate, checkpoint, problems)
    replaced = _replacements(adapter, full, locate, checkpoint, problems)
    _say(adapter, problems)
    result = MergePlan(plan, notes=notes)
    result.num_factors = len(wanted) + len(additions)
    written = {each.name: Tensor(each.name, each.dtype, each.shape) for each in plan.outputs}
    if wanted:
        _add_experts(result, wanted, regions, parts(written, families, model.model_type), written)
    output_of = {each.copies[0].source.tensor: each for each in plan.outputs if len(each.copies) == 1}
    for name, addition in additions.items():
        output = output_of[name]
        if output.name in result.merged:
            raise CheckpointError(f"{name} is a part of {output.name}, which experts' factors are merged into")
        source_region, target = (
            _as_matrix(checkpoint.tensors[name], name),
            _as_matrix(written[output.name], output.name),
        )
        result.merged[output.name] = [Item(source_region, target, 0, addition)]
    for name, tensor in replaced.items():
        result.replaced[output_of[name].name] = tensor
    return result


def _say(adapter: Adapter, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        said = "".join(f"\n  - {each}" for each in [*problems[:10], *more])
        raise CheckpointError(f"{adapter.folder} does not fit this base:{said}", "nothing was written")


def _as_matrix(tensor: Tensor, name: str) -> Region:
    rows, cols = tensor.shape
    return Region(name, 0, rows, cols, cols, 1)


def _sort(
    adapter: Adapter, others: Iterable[str], problems: list[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """LoRA pairs by path of their module, and whole tensors by name in the model."""
    pairs: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    for name in others:
        match = _DENSE.fullmatch(name.removeprefix(PREFIX))
        if match and bool(match["kind"]) != bool(match["weight"]):
            pairs.setdefault(match["path"].removesuffix(".base_layer"), {})[(match["kind"] or "") + match["half"]] = (
                name
            )
        elif ".lora_" in name:
            problems.append(f"{name} is no plain LoRA factor")
        else:
            path = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.\w+$)", "", name.removeprefix(PREFIX))
            full[path] = name
    for path, pair in pairs.items():
        if sorted(pair) not in (["A", "B"], ["embedding_A", "embedding_B"]):
            problems.append(f"{path} has {' and '.join(pair.values())}, not a pair of lora_A and lora_B")
    return {path: pair for path, pair in pairs.items() if len(pair) == 2}, full


def _stem(path: str) -> str | None:
    """What stands before the layer's number: `model.layers` of model.layers.3.self_attn.q_proj."""
    match = re.match(r"(.+?)\.\d+(?=\.|$)", path)
    return match[1] if match else None


def _renaming(
    checkpoint: Checkpoint,
    found: Found,
    dense: Iterable[str],
    regions: Mapping[tuple[str, str, int], Region],
    notes: list[str],
) -> dict[str, str]:
    """Stems of the adapter -> stems of the checkpoint, where they differ (`model.layers`, `backbone.layers`)."""
    layers = {layer for layer, _, _ in regions}
    stems = {stem for name in (*checkpoint.tensors, *layers) if (stem := _stem(name))}
    mine: dict[str, set[tuple[str, bool]]] = {}
    for path, expert in [*((each.layer, True) for each in found.experts), *((path, False) for path in dense)]:
        stem = _stem(path)
        if stem is not None and stem not in stems:
            mine.setdefault(stem, set()).add((path, expert))
    renamed = {}
    for stem, paths in mine.items():
        fits = [
            other
            for other in sorted(stems)
            if all(
                (other + path[len(stem) :] in layers)
                if expert
                else (other + path[len(stem) :] + ".weight" in checkpoint.tensors)
                for path, expert in paths
            )
        ]
        if len(fits) == 1:
            renamed[stem] = fits[0]
            notes.append(f"{stem} of the adapter is {fits[0]} of the base: the only place where all of it fits")
    return renamed


def _renamed(rename: Mapping[str, str], path: str) -> str:
    stem = _stem(path)
    if stem is not None and stem in rename:
        return rename[stem] + path[len(stem) :]
    for old, new in rename.items():  # what stands beside the layers: model.norm, model.embed_tokens
        parent = old.rpartition(".")[0] + "."
        if len(parent) > 1 and path.startswith(parent):
            return new.rpartition(".")[0] + path[len(parent) - 1 :]
    return path


def _locate(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], rename: Mapping[str, str], name: str
) -> str | None:
    """The checkpoint's name of a tensor."""
    options = (name, names.get(name), (there := _renamed(rename, name)), names.get(there))
    return next((each for each in options if each is not None and each in tensors), None)


def _expert_additions(
    found: Found,
    families: Families,
    model,
    rename: Mapping[str, str],
    regions,
    checkpoint: Checkpoint,
    problems: list[str],
) -> dict[tuple[str, str, int], Addition]:
    if not found.experts:
        return {}
    order, cache = naming_for(found, model, families).order, Cache(8)
    numbers: dict[tuple[str, str], list[int]] = {}
    for layer, role, expert in regions:
        numbers.setdefault((layer, role), []).append(expert)
    wanted = {}
    for experts in found.experts:
        layer = _renamed(rename, experts.layer)
        for factors in experts.factors:
            for role in factors.roles:
                there = numbers.get((layer, role), [])
                if len(there) != experts.num_experts:
                    has = f"experts {ranges(sorted(there))}" if there else "no such experts"
                    problems.append(
                        f"{experts.path}: {role} of {experts.num_experts} experts; the base has {has} in {layer}"
                    )
                    continue
                rows = factors.out_features // len(factors.roles)
                for expert in range(experts.num_experts):
                    region = regions[layer, role, expert]
                    tensor = checkpoint.tensors[region.tensor]
                    if (region.rows, region.cols) != (rows, factors.in_features) or tensor.dtype not in FLOATS:
                        problems.append(
                            f"{experts.path} {role} of expert {expert}: B A is {[rows, factors.in_features]}, "
                            f"the base has {tensor.dtype} {[region.rows, region.cols]} in {region.tensor}"
                        )
                        break
                    make = partial(_expert_factors, cache, factors, role, factors.order or order, expert)
                    name = f"{experts.path}.{expert} {role}"
                    of = Addition(name, f"experts {role}", factors.scaling, rows, factors.in_features, make)
                    wanted[layer, role, expert] = of
    return wanted


def _expert_factors(cache: Cache, factors: Factors, role: str, order: str, expert: int) -> tuple[Array, Array]:
    a, b = cache.load(factors)
    b = rows_of(b, factors.roles, role, order)
    return to_floats(a[expert].copy(), factors.dtype), to_floats(b[expert].copy(), factors.dtype)


def _dense_additions(
    adapter: Adapter, pairs: Mapping[str, Mapping[str, str]], locate, checkpoint: Checkpoint, problems: list[str]
) -> dict[str, Addition]:
    found: dict[str, Addition] = {}
    for path, pair in pairs.items():
        embedding = "embedding_A" in pair
        a, b = (adapter.tensors[pair[("embedding_" if embedding else "") + half]] for half in "AB")
        config = adapter.config
        rank, alpha = _rank_and_alpha(config, path)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{a.described} and {b.described} are no factors of one matrix")
            continue
        if a.shape[0] != rank:
            problems.append(f"{a.described} has rank {a.shape[0]}, adapter_config.json says r={rank} for {path}")
            continue
        name = locate(path + ".weight")
        if name is None:
            problems.append(f"{path}: the base has no {path}.weight{_tied(checkpoint, path)}")
            continue
        tensor = checkpoint.tensors[name]
        shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            problems.append(f"{path}: B A is {list(shape)}, the base has {tensor.described}")
            continue
        if name in found:
            problems.append(f"{path}: {name} is adapted twice")
        make = partial(_dense_factors, adapter, a, b, embedding)
        role = path.rpartition(".")[2]
        found[name] = Addition(path, role, config.scaling(rank, alpha), *shape, make)
    return found


def _tied(checkpoint: Checkpoint, path: str) -> str:
    tied = path.endswith("lm_head") and checkpoint.config.get("tie_word_embeddings")
    return ", as the output layer is tied to the embedding" if tied else ""


def _rank_and_alpha(config: AdapterConfig, path: str) -> tuple[int, float]:
    parameter = f"{path}.weight"
    if any(parameter == each or parameter.endswith(f".{each}") for each in config.target_parameters):
        path = parameter
    return config.rank_of(path), config.alpha_of(path)


def _dense_factors(adapter: Adapter, a: Tensor, b: Tensor, embedding: bool) -> tuple[Array, Array]:
    first, second = to_floats(adapter.read(a.name), a.dtype), to_floats(adapter.read(b.name), b.dtype)
    return (second.T, first.T) if embedding else (first, second)


def _replacements(
    adapter: Adapter, full: Mapping[str, str], locate, checkpoint: Checkpoint, problems: list[str]
) -> dict[str, str]:
    """Whole tensors of the adapter (`modules_to_save`), by the checkpoint's name."""
    found: dict[str, str] = {}
    for path, name in full.items():
        mine, there = adapter.tensors[name], locate(path)
        if there is None:
            problems.append(f"{name}: the base has no {path}{_tied(checkpoint, path.removesuffix('.weight'))}")
        elif (
            checkpoint.tensors[there].shape != mine.shape
            or checkpoint.tensors[there].dtype not in FLOATS
            or mine.dtype not in FLOATS
        ):
            problems.append(f"{mine.described} does not fit {checkpoint.tensors[there].described}")
        else:
            found[there] = name
    return found


def _add_experts(
    result: MergePlan, wanted: dict[tuple[str, str, int], Addition], regions, found, written: Mapping[str, Tensor]
) -> None:
    """Every output that holds an adapted matrix, with all matrices it holds."""
    items: dict[str, list[Item]] = {}
    for part in found:
        if part.expert >= 0 and "." not in part.role:
            key = (part.layer, part.role, part.expert)
            items.setdefault(part.region.tensor, []).append(
                Item(regions[key], part.region, part.expert, wanted.get(key))
            )
    result.merged = {name: of for name, of in items.items() if any(item.addition for item in of)}
    covered = sum(1 for of in result.merged.values() for item in of if item.addition)
    if covered != len(wanted):
        raise CheckpointError(f"{len(wanted)} matrices are adapted, {covered} of them are written")
    for name, of in result.merged.items():
        if sum(item.target.rows * item.target.cols for item in of) != math.prod(written[name].shape):
            raise CheckpointError(f"{name} holds more than experts that are known: it cannot be merged into")
