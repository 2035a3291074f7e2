"""Every mixture-of-experts family of transformers as a tiny model: the test material of the parity tests.

The families are data, in `family_data.py`. `available_families()` leaves out what the installed transformers does not
have, or does not let an experts function replace.

Sizes: B batch, S sequence, H hidden, E experts, K top-k.
"""

import dataclasses
import importlib
import inspect
import re
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.family_data import EXPERTS, FAMILIES, SIZES, VOCAB


def _values(config_class: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a tiny `config_class`: the `SIZES` it has fields for, then `overrides`, nested alike."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    own = dict(overrides)
    for name, nested in config_class.sub_configs.items():
        of_nested = own.pop(name, {})
        if "model_type" in of_nested:
            nested = transformers.CONFIG_MAPPING[of_nested["model_type"]]
        values[name] = _values(nested, of_nested)
    return values | own


def _folder(family: str) -> str:
    return FAMILIES[family].folder or family


@cache
def decorated_classes() -> dict[str, tuple[str, ...]]:
    """Experts classes that the installed transformers lets an experts function replace, by folder; imports none."""
    models = Path(transformers.__path__[0], "models")
    pattern = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\s+class (\w+)", re.MULTILINE)
    found = {file.parent.name: pattern.findall(file.read_text()) for file in sorted(models.glob("*/modeling_*.py"))}
    return {folder: tuple(names) for folder, names in found.items() if names}


def available_families() -> list[str]:
    """The families whose experts the installed transformers has, decorated."""
    return [family for family in FAMILIES if _folder(family) in decorated_classes()]


def model_class(family: str) -> Any:
    """The family's model class; imports only its modeling file."""
    module = importlib.import_module(f"transformers.models.{_folder(family)}.modeling_{_folder(family)}")
    return getattr(module, FAMILIES[family].model)


def tiny_config(family: str, **overrides: Any) -> Any:
    """A fresh config of the family's tiny model; `overrides` go on top of the family's own."""
    config_class = model_class(family).config_class
    return config_class(**_values(config_class, {**FAMILIES[family].config, **overrides}))


def build_tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The family's tiny model in training mode, on the CPU, with the same weights for the same seed.

    Args:
        family: key of `FAMILIES`.
        dtype: dtype of parameters and buffers; the values are those of fp32, rounded.
        seed: of the weights.
        overrides: config values on top of the family's own.
    """
    model = model_class(family)._from_config(tiny_config(family, **overrides), dtype=dtype)
    randomise(model, seed)
    return model.train()


def randomise(model: nn.Module, seed: int = 0, only: str = "") -> None:
    """Set every parameter, and every buffer that routes, to noise of a scale that keeps activations near 1.

    With `only`, those whose names hold it.

    Needed because transformers starts some experts, biases and correction terms at zero, where gradients say nothing.
    A tensor's values depend on its name, its shape and the seed alone.
    """
    for name, parameter in model.named_parameters():
        if only not in name:
            continue
        noise = _noise(name, parameter.shape, seed)
        if parameter.ndim >= 2:
            values = noise * parameter.shape[-1] ** -0.5
        else:
            values = 0.1 * noise + (1.0 if "norm" in name.lower() else 0.0)
        parameter.data.copy_(values)
    for name, buffer in model.named_buffers():
        if only not in name:
            continue
        if buffer.is_floating_point() and "bias" in name:  # correction biases of the routers
            buffer.copy_(0.02 * _noise(name, buffer.shape, seed))
        elif not buffer.is_floating_point() and buffer.ndim == 2:  # tables from token to experts
            buffer.copy_(_noise(name, (buffer.shape[0], EXPERTS), seed).argsort(dim=-1)[:, : buffer.shape[1]])


def _noise(name: str, shape: torch.Size | tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator)


def tiny_inputs(family: str, batch: int = 2, sequence: int = 13, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and labels [B,S] int64, and whatever else the family needs to reach all its experts."""
    generator = torch.Generator().manual_seed(seed)
    bounds = {"input_ids": VOCAB, **FAMILIES[family].inputs}
    inputs = {name: torch.randint(high, (batch, sequence), generator=generator) for name, high in bounds.items()}
    inputs["labels"] = inputs["input_ids"].clone()
    if FAMILIES[family].embeds:
        inputs["inputs_embeds"] = _noise("embeds", (batch, sequence, SIZES["hidden_size"]), seed)
        del inputs["input_ids"]
    return inputs


def tiny_loss(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss; of a model that takes no labels, the mean of its output times fixed noise."""
    takes = inspect.signature(model.forward).parameters
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels" or "labels" in takes})
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    states = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return (states.float() * _noise("probe", states.shape, 0)).mean()


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose class transformers decorated, with their names."""
    for name, module in model.named_modules():
        if hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed"):
            yield name, module
