"""Write a model in the layout of the Hugging Face hub, whatever shards it into pieces meanwhile.

`fully_shard` leaves three ways to write a wrong checkpoint, or none, without being told. Each has a guard here:
`accelerator.save_model` writes the in-memory names without a config; `Trainer.save_model` writes nothing at all under
SHARDED_STATE_DICT; `save_pretrained` takes what the calling rank has.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_accel.errors import CheckpointError

SAVE_HINT = (
    "call on every rank: accelerator.save_model(model, folder), or\n"
    "accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process, "
    "state_dict=accelerator.get_state_dict(model))"
)


def save_hub(accelerator: Any, model: nn.Module, folder: Any, max_shard_size: int | str = "10GB") -> None:
    """Write weights, config.json and generation_config.json; `from_pretrained` of plain transformers loads them.

    Every rank has to call it: the weights are gathered on rank 0, which writes.

    Raises:
        CheckpointError: `folder` is a file.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{folder} is a file, a checkpoint is a folder")
    weights = accelerator.get_state_dict(model)
    if accelerator.should_save_model and accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
        unwrapped.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    accelerator.wait_for_everyone()


def guard_save_pretrained(original: Callable) -> Callable:
    """Around `PreTrainedModel.save_pretrained`: a sharded model is written from gathered weights, or not at all."""

    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self):
            weights = kwargs.get("state_dict", args[1] if len(args) > 1 else None)
            if weights is None:
                raise CheckpointError(
                    f"save_pretrained({str(save_directory)!r}) without state_dict: this rank holds only its shards of "
                    f"{type(self).__name__.removeprefix('FSDP')}",
                    SAVE_HINT,
                )
            if isinstance(weights, Mapping):
                if not weights:  # what get_state_dict gives every rank but the first; writing it would undo rank 0's
                    return None
                pieces = [name for name, tensor in weights.items() if isinstance(tensor, DTensor)]
                if pieces:
                    raise CheckpointError(
                        f"save_pretrained({str(save_directory)!r}) got {len(pieces)} weights as shards, the first is "
                        f"{pieces[0]}",
                        SAVE_HINT,
                    )
                tie(self, weights)
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def tie(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Make tied weights one tensor again, in place: each was gathered by itself, and both would be written."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        copy, tensor = weights.get(target), weights.get(source)
        if copy is not None and tensor is not None and copy is not tensor and torch.equal(copy, tensor):
            copy.set_(tensor)  # pyright: ignore[reportArgumentType]


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are DTensors that transformers did not make itself (`distributed_config`)."""
    if getattr(getattr(model, "config", None), "distributed_config", None) is not None:
        return False
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def full_state_dict_type(fsdp_plugin: Any) -> Iterator[None]:
    """For a while, let accelerate's FSDP plugin say FULL_STATE_DICT."""
    configured = fsdp_plugin.state_dict_type
    fsdp_plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        fsdp_plugin.state_dict_type = configured
