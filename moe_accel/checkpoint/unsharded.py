"""Resume on one GPU what FSDP2 ranks saved: `accelerator.load_state` without FSDP of a folder written with it.

accelerate looks for other files there and finds none. The names in the state dicts are the model's own in both cases,
so both kinds of folder can be read: FULL_STATE_DICT is one torch file, SHARDED_STATE_DICT is read by
torch.distributed.checkpoint in this process alone.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

from moe_accel.checkpoint.files import fsdp_path


def load_unsharded(accelerator: Accelerator, folder: Path, load_rest: Callable[[], Any]) -> Any:
    """Load models and optimizers from an FSDP2 folder, and everything else in it by accelerate's own `load_rest`."""
    models, optimizers = accelerator._models, accelerator._optimizers
    for index, model in enumerate(models):
        _load_model(accelerator.unwrap_model(model), folder, index)
    for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=False)):
        _load_optimizer(accelerator.unwrap_model(model), optimizer, folder, index)
    try:
        accelerator._models, accelerator._optimizers = [], []
        return load_rest()
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def _load_model(model: nn.Module, folder: Path, index: int) -> None:
    full = fsdp_path(folder, FSDP_MODEL_NAME, index, full=True)
    if full.is_file():
        state = torch.load(full, map_location="cpu", mmap=True, weights_only=True)
    else:
        state = model.state_dict()
        _read_sharded({"model": state}, fsdp_path(folder, FSDP_MODEL_NAME, index, full=False))
    model.load_state_dict(state)


def _load_optimizer(model: nn.Module, optimizer: Any, folder: Path, index: int) -> None:
    full = fsdp_path(folder, OPTIMIZER_NAME, index, full=True)
    if full.is_file():
        state = torch.load(full, map_location="cpu", weights_only=True)
    else:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _read_sharded(state, fsdp_path(folder, OPTIMIZER_NAME, index, full=False))
        state = state["optimizer"]
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=full.is_file()))


def _read_sharded(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():  # torch says that one process reads alone, which is what is wanted
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_sharded(state, storage_reader=FileSystemReader(folder), no_dist=True)
