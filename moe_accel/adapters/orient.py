"""Which way round stacked factors lie: what shapes, siblings, versions and marks say, and refusal where they do not.

PEFT took every stacked parameter [E, d1, d2] for (input, output) features up to 0.18, asked the experts class
(`is_transposed`) the wrong way round in 0.19.0, and the right way since 0.19.1. It turned no file that was there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_accel.adapters.numbers import to_floats
from moe_accel.adapters.source import Adapter
from moe_accel.convert.layout import Family
from moe_accel.convert.regions import Tensor
from moe_accel.errors import CheckpointError

LORA_ORDERS = ("standard", "swapped")
B_LAYOUTS = ("rank_major", "grouped_by_expert")
ORDER_HINT = "--lora-order standard: A acts on the input, as PEFT >= 0.19.1 writes; swapped: on the output, as before"
B_HINT = "--lora-b-layout rank_major: as PEFT; grouped_by_expert: as Unsloth before 2026-09-17 and Megatron-Bridge"
_CONTRADICTION = 40.0
"""Ratio of the two readings' F values above which the usual one is not believed. Of 10,000 random B without any
difference between experts, 8 of them, rank 4, the largest ratio was 9.4."""
_FEWEST_COLUMNS = 4
"""Columns an expert must have for its norms to say anything: with 2, chance alone reached a ratio of 60."""


@dataclass(frozen=True)
class Sides:
    """A pair of stacked factors: A has `rows` = E * r rows and x columns, B y rows. `rank`: if the shapes say it."""

    a: Tensor
    b: Tensor
    rows: int
    x: int
    y: int
    rank: int | None


def is_swapped(
    path: str,
    sides: Mapping[str, Sides],
    version: tuple[int, ...] | None,
    family: Family | None,
    width: int | None,
    said: str | None,
) -> bool:
    """Whether A acts on the outputs.

    Args:
        path: of the experts module.
        sides: the pairs, by parameter.
        version: `peft_version` of adapter_config.json.
        family: of the model, if it is known.
        width: of the model, if it is known.
        said: `--lora-order`.

    Raises:
        CheckpointError: the shapes fit neither way, or nothing decides.
    """
    pairs = {leaf: (each.x, each.y) for leaf, each in sides.items()}
    shown = ", ".join(
        f"{each.a.name} {list(each.a.shape)}, {each.b.name} {list(each.b.shape)}" for each in sides.values()
    )
    possible = [order for order in LORA_ORDERS if _fits(pairs, order)]
    if not possible:
        raise CheckpointError(f"{path}: these do not belong to the same experts, whichever way round: {shown}")
    if said is not None:
        if said not in possible:
            raise CheckpointError(f"{path} cannot be {said}: {shown}")
        return said == "swapped"
    if len(possible) == 1:
        return possible == ["swapped"]
    by_width = [order for order in possible if width is not None and _has_width(pairs, order, width)]
    by_version = _by_version(version, family, path)
    answers = {each for each in (by_width[0] if len(by_width) == 1 else None, by_version) if each}
    if len(answers) == 1:
        return answers == {"swapped"}
    reasons = [f"the shapes go both ways ({shown})"]
    reasons.append(
        f"a width of {width} decides nothing"
        if width and len(by_width) != 1
        else "no other LoRA shows the model's width"
        if not width
        else f"the model's width of {width} says {by_width[0]}"
    )
    if by_version:
        reasons.append(f"peft_version says {by_version}")
    else:
        shown_version = ".".join(map(str, version)) if version else "missing"
        reasons.append(f"peft_version {shown_version} does not decide" if version else "there is no peft_version")
    raise CheckpointError(f"{path}: unclear whether A acts on inputs or outputs: {'; '.join(reasons)}", ORDER_HINT)


def _fits(pairs: Mapping[str, tuple[int, int]], order: str) -> bool:
    """Whether inputs and outputs of the projections belong together in that order."""
    read = {leaf: xy if order == "standard" else xy[::-1] for leaf, xy in pairs.items()}
    first = read.get("gate_up_proj") or read.get("up_proj")
    if "gate_up_proj" in read and read["gate_up_proj"][1] % 2:
        return False
    if first is None or "down_proj" not in read:
        return True
    hidden, inner = first[0], first[1] // (2 if "gate_up_proj" in read else 1)
    return read["down_proj"] == (inner, hidden)


def _has_width(pairs: Mapping[str, tuple[int, int]], order: str, width: int) -> bool:
    read = {leaf: xy if order == "standard" else xy[::-1] for leaf, xy in pairs.items()}
    return all((xy[1] if leaf == "down_proj" else xy[0]) == width for leaf, xy in read.items())


def _by_version(version: tuple[int, ...] | None, family: Family | None, path: str) -> str | None:
    if version is None:
        return None
    stacked = family.layouts.get("stacked") if family else None
    if version >= (0, 19, 1):
        if family is None and path.endswith("feed_forward.experts"):
            return None  # could be Llama-4, which PEFT swaps to this day
        return "swapped" if family is not None and family.peft == "swapped" else "standard"
    if version >= (0, 19, 0):
        if stacked is None or family is None:
            return None
        return "standard" if family.peft == "swapped" else "swapped"
    if stacked is None:
        return None
    return "standard" if stacked.transposed else "swapped"


def b_layout(
    adapter: Adapter, tensors: Sequence[tuple[str, int]], swapped: bool, said: str | None, notes: list[str]
) -> bool:
    """Whether B's columns are grouped by expert: column j belongs to expert j // r, not j % E.

    Args:
        adapter: to read B from.
        tensors: names of the file's lora_B, each with its number of experts.
        swapped: whether A acts on the outputs.
        said: `--lora-b-layout`.
        notes: told what was taken for granted.

    Raises:
        CheckpointError: a mark that is not known, a file that several tools could have written, each with its own
            meaning, or norms of columns that contradict the usual reading.
    """
    marker = adapter.config.raw.get("lora_B_layout")
    chosen = said or marker
    if chosen is not None:
        if chosen not in B_LAYOUTS:
            raise CheckpointError(f"lora_B_layout is {str(chosen)[:40]!r}, not one of {', '.join(B_LAYOUTS)}", B_HINT)
        return chosen == "grouped_by_expert"
    if (adapter.config.raw.get("auto_mapping") or {}).get("unsloth_fixed"):
        raise CheckpointError(
            f"{adapter.folder} was written by Unsloth, which grouped lora_B by expert until 2026-09-17 and says since "
            "then which it is (lora_B_layout in adapter_config.json); this one does not",
            B_HINT,
        )
    if swapped and adapter.config.version is None:
        raise CheckpointError(
            f"{tensors[0][0]}: A acts on the output and there is no peft_version: PEFT 0.17 and NeMo AutoModel keep "
            "the columns of B by rank, Megatron-Bridge by expert",
            B_HINT,
        )
    for name, num_experts in tensors:
        rank_major, grouped = contrast(to_floats(adapter.read(name), adapter.tensors[name].dtype), num_experts)
        if grouped > _CONTRADICTION * max(rank_major, 1.0):
            raise CheckpointError(
                f"{name}: norms of its columns differ between groups of neighbours, as if B were grouped by expert "
                f"(F = {grouped:.0f}; read by rank, {rank_major:.1f})",
                B_HINT,
            )
    notes.append("columns of lora_B read by rank, as PEFT does")
    return False


def contrast(b: np.ndarray[Any, Any], num_experts: int) -> tuple[float, float]:
    """How much the norms of B's columns differ between experts compared with within, read by rank and grouped.

    The ratio of variances (F) of the columns' log norms. Experts are trained on different numbers of tokens, so the
    right reading has the larger ratio, if there is a difference at all.
    """
    norms = np.sqrt(np.einsum("or,or->r", b, b, dtype=np.float64))
    if num_experts == 1 or norms.size < _FEWEST_COLUMNS * num_experts or not norms.any():
        return 1.0, 1.0
    logs = np.log(np.maximum(norms, norms[norms > 0].min() / 10))
    return _ratio(logs.reshape(-1, num_experts).T), _ratio(logs.reshape(num_experts, -1))


def _ratio(groups: np.ndarray[Any, Any]) -> float:
    between = groups.mean(axis=1).var(ddof=1) * groups.shape[1]
    within = groups.var(axis=1, ddof=1).mean()
    return float(between / max(within, 1e-12 + between * 1e-9)) if between > 1e-12 else 1.0
