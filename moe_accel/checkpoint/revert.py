"""Which weights of the checkpoint come from which weights of the model, known from shapes alone.

Names and splits are transformers' own: the reversed conversions that `save_pretrained` runs on the whole model at once
(`revert_weight_conversion`). Here they are sorted into groups that can be converted one by one, and tried on meta
tensors: every rank knows all names, shapes and dtypes of the checkpoint without a byte being moved. Where a conversion
treats experts one by one, a rank can run it on the experts it has: a group then has `rows`, the experts.

Legend: E experts of a layer, n experts of a slice.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_accel.checkpoint.load import default_conversions

Shapes = dict[str, tuple[torch.Size, torch.dtype]]

_convert_name: Any = getattr(core_model_loading, "apply_converters", None)
_rename: Any = getattr(core_model_loading, "apply_renamings", None)
"""Those of newer transformers, 5.24 among them, which rename what comes out of a conversion; 5.17 what goes into it."""


@dataclass(frozen=True)
class Group:
    """Weights of the model that one conversion turns into weights of the checkpoint.

    Attributes:
        key: the name that the conversion goes by.
        transform: transformers' reversed conversion; None where the weight keeps its values and gets a name.
        sources: (name in the model, pattern of `transform` that it matched).
        targets: shape and dtype of every weight of the checkpoint, by name.
        num_rows: first dimension of the sources, if any slice of it can be converted by itself; None if not.
        templates: names of one expert's weights with `{e}` for its number, where experts have weights of their own;
            empty where rows of the sources are rows of the targets.
        renamings: transformers' reversed renamings that what is converted still has to go through.
    """

    key: str
    transform: Any
    sources: tuple[tuple[str, str], ...]
    targets: Shapes
    num_rows: int | None
    templates: tuple[str, ...]
    renamings: tuple[Any, ...] = ()

    def convert(self, model: nn.Module, tensors: Mapping[str, Tensor], start: int = 0) -> dict[str, Tensor]:
        """Weights of the checkpoint from the sources, or from rows `start`... of them; tensors may share memory."""
        if self.transform is None:
            return {self.key: tensors[self.sources[0][0]]}
        converted = _run(self.transform, self.key, self.sources, tensors, model, self.renamings)
        if not self.templates:
            return converted
        num_rows = len(next(iter(tensors.values())))
        return {
            template.format(e=start + row): converted[template.format(e=row)]
            for row in range(num_rows)
            for template in self.templates
        }


def group_weights(model: nn.Module, shapes: Shapes, stacked: bool) -> list[Group]:
    """The groups of all weights of a model, in the order in which `save_pretrained` would write them.

    Args:
        model: a transformers model, sharded or not.
        shapes: what there is to save, by name in the model.
        stacked: keep names and layout as they are in the model.
    """
    metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    if stacked:
        return [_renamed(name, name, metas[name]) for name in metas]
    found: Any = getattr(model, "_weight_conversions", None)
    found = default_conversions(model) if found is None else found
    reversed_ones = [each.reverse_transform() for each in (found or [])[::-1]]
    renamings = [each for each in reversed_ones if isinstance(each, WeightRenaming)]
    converters = [each for each in reversed_ones if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(metas, key=dot_natural_key):
        key, pattern = _key_of(name, renamings, converters)
        transform = None if pattern is None else by_pattern[pattern]
        collected.setdefault(key, (transform, []))[1].append((name, pattern or name))
    after = () if _rename is None else tuple(renamings)
    return [_group(model, key, transform, sources, metas, after) for key, (transform, sources) in collected.items()]


def _key_of(name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
    """The name that a weight's conversion goes by, and the pattern that it matched; without one, its new name."""
    if _rename is None:
        return rename_source_key(name, renamings, converters, reverse=True)
    key, pattern = _convert_name(name, converters)
    return (_rename(name, renamings), None) if pattern is None else (key, pattern)


def _renamed(name: str, key: str, meta: Tensor) -> Group:
    return Group(key, None, ((name, name),), {key: (meta.shape, meta.dtype)}, len(meta) if meta.ndim else None, ())


def _group(
    model: nn.Module,
    key: str,
    transform: Any,
    sources: list[tuple[str, str]],
    metas: dict[str, Tensor],
    renamings: tuple[Any, ...],
) -> Group:
    inputs = {name: metas[name] for name, _ in sources}
    if transform is None:
        return _renamed(sources[0][0], key, inputs[sources[0][0]])
    outputs = _run(transform, key, sources, inputs, model, renamings)
    if len(outputs) == len(inputs) == 1 and next(iter(outputs.values())) is next(iter(inputs.values())):
        return _renamed(sources[0][0], next(iter(outputs)), next(iter(inputs.values())))  # nothing was converted
    targets = {name: (tensor.shape, tensor.dtype) for name, tensor in outputs.items()}
    num_rows = _num_rows(transform, list(inputs.values()))
    templates: tuple[str, ...] = ()
    if num_rows is not None and any(isinstance(each, SplitModulelist) for each in transform.operations):
        first = _run(transform, key, sources, {name: meta[:1] for name, meta in inputs.items()}, model, renamings)
        templates = _templates(first, targets, num_rows)
        num_rows = num_rows if templates else None
    return Group(key, transform, tuple(sources), targets, num_rows, templates, renamings)


def _num_rows(transform: Any, inputs: list[Tensor]) -> int | None:
    """The experts E, if the conversion treats each expert by itself: None at the first operation that may not."""
    ndim = inputs[0].ndim
    if ndim < 2 or len({len(each) for each in inputs}) > 1:
        return None
    for each in transform.operations:
        if isinstance(each, SplitModulelist) and each.dim == 0:
            break  # from here on every expert is a tensor of its own
        across = isinstance(each, Chunk | Concatenate) and each.dim % ndim and each.num_shards_attribute is None
        # with check_dims it compares the whole shape with the model's
        turned = isinstance(each, Transpose) and each.dim0 % ndim and each.dim1 % ndim and not each.check_dims
        if not (across or turned):
            return None
    return len(inputs[0])


def _templates(first: Mapping[str, Tensor], targets: Shapes, num_rows: int) -> tuple[str, ...]:
    """Names of the first expert's weights with `{e}` for its number; empty if that does not give all the targets."""
    templates = []
    for name in first:
        parts = name.split(".")
        for at in [at for at, part in enumerate(parts) if part == "0"]:
            template = ".".join([*parts[:at], "{e}", *parts[at + 1 :]])
            if all(template.format(e=row) in targets for row in range(num_rows)):
                templates.append(template)
                break
    names = {template.format(e=row) for template in templates for row in range(num_rows)}
    return tuple(templates) if names == targets.keys() else ()


def _run(
    transform: Any,
    key: str,
    sources: Any,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    renamings: tuple[Any, ...],
) -> dict[str, Tensor]:
    transform = deepcopy(transform)
    for name, pattern in sources:
        transform.add_tensor(key, name, pattern, tensors[name])
    converted = transform.convert(key, model=model, config=model.config)
    names = {name: _rename(name, renamings) if renamings else name for name in converted}
    return {names[name]: value[0] if isinstance(value, list) else value for name, value in converted.items()}
