"""Read a Hugging Face checkpoint into a live model: every weight exactly, or an error that says what is missing.

`Trainer` reloads what `save_pretrained` wrote with `model.load_state_dict(..., strict=False)`. The files hold one
tensor per expert, the model one stack per layer: the names do not meet, and the experts stay as they were, with a
warning (huggingface/transformers#48805, the same in 5.17 and 5.23). Here the files go through the conversion that
`from_pretrained` uses, one target at a time: at most one layer's experts are in memory twice. The values are copied
into the parameters the model has, so optimizers, DDP and FSDP2 keep their references.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_accel.checkpoint.files import RESUME_HINT, open_weights, shorten
from moe_accel.errors import CheckpointError


@dataclass
class _Target:
    """One conversion: the checkpoint's names it takes, each with the pattern of `transform` that matched it."""

    transform: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def counts(self) -> str:
        """How many weights came for each pattern, where an expert that is not there shows."""
        counted = Counter(pattern for _, pattern in self.sources)
        return ", ".join(f"{count} {pattern}" for pattern, count in counted.items())


def load_hub_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights in `folder` into `model`, a transformers model, sharded by FSDP2 or not.

    Of a sharded model every rank reads the files and keeps its own shards; nothing is sent between ranks.

    Raises:
        CheckpointError: a file is missing or cut short, or the weights are not exactly those of the model:
            names missing, names too many, other shapes. The weights read before the fault was met stay loaded.
    """
    weights = open_weights(folder)
    if weights is None:
        raise CheckpointError(f"{folder} holds no model weights", RESUME_HINT)
    state = model.state_dict(keep_vars=True)
    targets, unexpected = _plan(model, weights, state)
    loaded, problems = set(), []
    for name, target in targets.items():
        try:
            tensors = _convert(model, name, target, weights)
        except Exception as error:  # the conversion of a damaged set of experts fails in many ways
            problems.append(f"{name} cannot be built from {target.counts()}: {error}")
            loaded.add(name)
            continue
        for key, tensor in tensors.items():
            loaded.add(key)
            problem = _copy(key, tensor, state.get(key))
            if problem:
                problems.append(f"{problem} (from {target.counts()})")
    missing = _missing(model, state, loaded)
    if missing:
        problems.append(f"{len(missing)} weights of the model are not in it: {shorten(missing)}")
    if unexpected := _without(unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None)):
        problems.append(f"{len(unexpected)} weights in it are not in the model: {shorten(unexpected)}")
    if problems:
        name = type(model).__name__.removeprefix("FSDP")  # the class that fully_shard makes
        raise CheckpointError(
            f"{folder} does not hold {name}:\n" + "\n".join(f"  - {p}" for p in problems), RESUME_HINT
        )


def default_conversions(model: nn.Module) -> list[Any] | None:
    """What turns hub names and layout into the model's, for a model that was not built by `from_pretrained`.

    It is what `save_pretrained` would find itself, were the model's class not replaced by `fully_shard`.
    """
    with _unsharded_classes(model):
        found = get_model_conversion_mapping(model, add_legacy=False)  # pyright: ignore[reportArgumentType]
    return [each for each in found if not isinstance(each, PrefixChange)] or None


def _plan(
    model: nn.Module, weights: dict[str, Any], state: dict[str, torch.Tensor]
) -> tuple[dict[str, _Target], list[str]]:
    """Which conversion takes which weights, by the name of its first target; and the names that nothing takes."""
    with _unsharded_classes(model):
        transforms = get_model_conversion_mapping(model)  # pyright: ignore[reportArgumentType]
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix: str = getattr(model, "base_model_prefix", "")
    targets: dict[str, _Target] = {}
    unexpected = []
    for source in sorted(weights, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name not in state:
            unexpected.append(source)
        elif pattern is not None:
            target = targets.setdefault(name, _Target(deepcopy(by_pattern[pattern])))
            target.sources.append((source, pattern))
        else:
            targets.setdefault(name, _Target(WeightRenaming(source, name))).sources.append((source, source))
    return targets, unexpected


def _convert(model: nn.Module, name: str, target: _Target, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the sources of one conversion and run it: model name -> full tensor on the CPU, in the file's dtype."""
    for source, pattern in target.sources:
        target.transform.add_tensor(name, source, pattern, weights[source][...])
    converted = target.transform.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


@torch.no_grad()
def _copy(name: str, tensor: torch.Tensor, live: torch.Tensor | None) -> str | None:
    """Copy a full tensor into the model's own, whatever its device, dtype and shards; what is wrong, if anything."""
    if live is None:
        return f"{name} is not in the model"
    if tensor.shape != live.shape:
        return f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(live.shape)}"
    if isinstance(live, DTensor):
        shard = distribute_tensor(
            tensor.to(live.to_local().device), live.device_mesh, live.placements, src_data_rank=None
        )
        live.to_local().copy_(shard.to_local())
    else:
        live.copy_(tensor)
    return None


def _missing(model: nn.Module, state: dict[str, torch.Tensor], loaded: set[str]) -> list[str]:
    """Names never loaded, without tied names of loaded weights and what the model's class says may be absent."""
    tensors = {id(state[name]) for name in loaded if name in state}
    missing = [name for name, tensor in state.items() if name not in loaded and id(tensor) not in tensors]
    missing = _without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None))
    return [name for name in missing if name not in (getattr(model, "_keys_to_ignore_on_save", None) or ())]


def _without(names: list[str], patterns: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


@contextmanager
def _unsharded_classes(model: nn.Module) -> Iterator[None]:
    """Give the modules their own classes back for a while.

    `fully_shard` puts a class made by torch in front, which transformers takes for a user's own model class: those
    have no conversions.
    """
    sharded = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module, made in sharded:
            module.__class__ = made.__mro__[2]  # (made, FSDPModule, the class): torch relies on the same order
        yield
    finally:
        for module, made in sharded:
            module.__class__ = made
