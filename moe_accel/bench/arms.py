"""The ways to compute that are compared. An arm changes a plain transformers model; nothing else differs.

native      as it is: transformers' grouped_mm
compile     torch.compile of the model, or of the block
liger       liger-kernel's own patch of the family, made before the model is built
moe_accel   `Accelerator(parallelism_config=MoEConfig()).prepare(model, optimizer)`
peer        a function of somebody else: see `Peer`
"""

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moe_accel.bench.shapes import Shape
from moe_accel.bench.suites import adamw
from moe_accel.errors import ConfigError, DependencyError, UnsupportedModelError


class Peer(Protocol):
    """What `--peer-module` names: a file or module with these functions.

    The model that `build` gets is a transformers model (of PEFT in the suite lora) on its device, with its weights.
    What it returns is called as `model(input_ids=..., labels=...)` and has a `loss`; in the suite kernel, the first
    module with a child `experts` in it is called with hidden states [B,S,H]. Parameters keep their names, or nobody
    knows what to compare with what. `patch`, which may be absent, is called before the model is built.
    """

    def build(self, model: nn.Module, shape: Shape) -> nn.Module:
        """The model that is measured: `model` changed in place, or another one with its weights."""
        ...

    def patch(self, shape: Shape) -> None:
        """Change classes or functions of transformers."""
        ...


def load_peer(name: str) -> Any:
    """Import the module of `--peer-module`.

    Raises:
        ConfigError: it has no function `build`.
    """
    if name.endswith(".py"):
        spec: Any = importlib.util.spec_from_file_location(Path(name).stem, name)
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
    else:
        peer = importlib.import_module(name)
    if not callable(getattr(peer, "build", None)):
        raise ConfigError(f"{name} has no function build(model, shape)", "its two functions: moe_accel/bench/arms.py")
    return peer


def before_build(arm: str, shape: Shape, peer: Any) -> None:
    """What an arm does before there is a model."""
    if arm == "liger":
        patch_with_liger(shape)
    if arm == "peer" and hasattr(peer, "patch"):
        peer.patch(shape)


def apply(
    arm: str, model: Any, optimizer: Any, shape: Shape, device: torch.device, kernels: str, peer: Any, whole: bool
) -> tuple[Any, Any, str]:
    """Model and optimizer of an arm, and what it says it did.

    Args:
        arm: its name.
        model, optimizer: of plain transformers; no optimizer in the suite kernel.
        shape: of the model.
        device: where it computes.
        kernels: `moe_config`'s, for moe_accel.
        peer: the module of `--peer-module`.
        whole: whether the whole model is a step, rather than its MoE block.
    """
    if arm == "compile" and whole:
        return torch.compile(model), optimizer, ""
    if arm == "moe_accel":
        return prepare(model, optimizer, device, kernels)
    if arm == "peer":
        built = peer.build(model, shape)
        return built, adamw(built) if whole else None, ""
    return model, optimizer, ""


def prepare(model: Any, optimizer: Any, device: torch.device, kernels: str) -> tuple[Any, Any, str]:
    """What a user's script does; the third value is what moe-accel reports."""
    from accelerate import Accelerator

    from moe_accel.parallelism import MoEConfig
    from moe_accel.plugin import reports

    accelerator = Accelerator(cpu=device.type == "cpu", parallelism_config=MoEConfig(kernels=kernels))
    if optimizer is None:
        model = accelerator.prepare(model)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, "\n".join(str(report) for report in reports(accelerator))


def patch_with_liger(shape: Shape) -> None:
    """liger-kernel's patch of the family, with the defaults that `use_liger_kernel` of Trainer has.

    Raises:
        DependencyError: liger-kernel is not installed.
        UnsupportedModelError: it has no patch for the family.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise DependencyError(
            "arm liger needs the package liger-kernel, which is not installed", "pip install liger-kernel"
        )
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES,
    )

    patch = PATCHES.get(shape.model_type)
    if patch is None:
        raise UnsupportedModelError(f"liger-kernel has no patch for {shape.model_type}")
    # the modeling file first: the patch replaces names in it, and the auto classes take them from there
    importlib.import_module(f"transformers.models.{shape.model_type}.modeling_{shape.model_type}")
    asked = {"fused_linear_cross_entropy": True, "cross_entropy": False}
    patch(**{name: value for name, value in asked.items() if name in inspect.signature(patch).parameters})
