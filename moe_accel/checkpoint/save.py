"""Write a model in the layout of the Hugging Face hub, whatever shards it into pieces meanwhile.

`fully_shard` leaves three ways to write a wrong checkpoint, or none, without being told. Each is mended here:
`accelerator.save_model` writes the in-memory names without a config; `Trainer.save_model` writes nothing at all under
SHARDED_STATE_DICT; `save_pretrained` takes what the calling rank has. All of them write through `save_sharded`, with
which nothing is gathered. What it cannot do (`push_to_hub`, `variant`, quantised models) is gathered, and said.
"""

import inspect
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_accel.checkpoint.publish import publish_weights
from moe_accel.checkpoint.revert import group_weights
from moe_accel.checkpoint.sharded import ONE_FILE_BYTES, boxes_of, files_of, plan, write
from moe_accel.errors import CheckpointError
from moe_accel.ranks import gather, tell

SAVE_HINT = (
    "call on every rank: accelerator.save_model(model, folder), or\n"
    "accelerator.unwrap_model(model).save_pretrained(folder)"
)
STAGING = ".moe-accel-saving"
ARRIVAL_S = 300.0
"""How long a rank in `save_pretrained` waits for the others, which may still be writing logs or evaluating."""


@dataclass(frozen=True)
class Saving:
    """How a prepared model is saved: experts stacked as in memory or not; through which device rows are sent."""

    stacked: bool
    device: torch.device


saving_of: WeakKeyDictionary[nn.Module, Saving] = WeakKeyDictionary()
_calls = itertools.count()


def save_hub(accelerator: Any, model: nn.Module, folder: Any, max_shard_size: int | str = "10GB") -> None:
    """Write weights, config.json and generation_config.json; `from_pretrained` of plain transformers loads them.

    Every rank has to call it. Of a sharded model every rank writes what it holds, nothing is gathered.

    Raises:
        CheckpointError: `folder` is a file.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{folder} is a file, a checkpoint is a folder")
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_sharded(unwrapped):
        unwrapped.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    weights = accelerator.get_state_dict(model)
    if accelerator.should_save_model and accelerator.is_main_process:
        unwrapped.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    accelerator.wait_for_everyone()


def guard_save_pretrained(original: Callable) -> Callable:
    """Around `PreTrainedModel.save_pretrained`: every rank writes its shards, or rank 0 what was gathered before."""
    signature = inspect.signature(original)

    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, save_directory, *args, **kwargs)
        weights = given.arguments.get("state_dict")
        if isinstance(weights, Deferred):
            weights.taken = True
            return None
        sharded = is_sharded(self)
        if sharded and weights is None:
            return _save_on_all_ranks(original, self, given)
        if sharded and isinstance(weights, Mapping):
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
        if self in saving_of and saving_of[self].stacked:
            given.arguments.setdefault("save_original_format", False)
        return original(*given.args, **given.kwargs)

    return save_pretrained


class Deferred(dict):
    """An empty state dict that `save_pretrained` leaves unwritten: `save_sharded` follows, on all ranks."""

    taken = False


def _save_on_all_ranks(original: Callable, model: PreTrainedModel, given: inspect.BoundArguments) -> None:
    folder = given.arguments["save_directory"]
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder} is a file, a checkpoint is a folder")
    _await_all_ranks(model, folder)
    asked = given.arguments
    needs_all = [name for name in ("push_to_hub", "variant", "distributed_checkpoint") if asked.get(name)]
    needs_all += ["hf_quantizer"] if getattr(model, "hf_quantizer", None) is not None else []
    needs_all += ["add_adapter"] if getattr(model, "_hf_peft_config_loaded", False) else []
    if needs_all:
        tell(f"save_pretrained with {', '.join(needs_all)}: all weights are gathered on rank 0, which writes them")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            tie(model, weights)
            asked["state_dict"] = weights
            asked.pop("distributed_checkpoint", None)
            original(*given.args, **given.kwargs)
        dist.barrier()
        return
    saving = saving_of.get(model)
    stacked = not asked["save_original_format"] if "save_original_format" in asked else bool(saving and saving.stacked)
    save_sharded(model, folder, asked.get("max_shard_size", "50GB"), stacked, original)


def _await_all_ranks(model: nn.Module, folder: Any) -> None:
    """Wait for the other ranks without a collective, which would hang for ever if they never come.

    Raises:
        CheckpointError: some did not call in time.
    """
    store = dist.distributed_c10d._get_default_store()
    key, num_ranks = f"moe_accel/save/{next(_calls)}", dist.get_world_size()
    deadline = time.monotonic() + ARRIVAL_S
    arrived = store.add(key, 1)
    while arrived < num_ranks:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"save_pretrained({str(folder)!r}): {arrived} of {num_ranks} ranks called it within {ARRIVAL_S:g} s; "
                f"each rank holds only its shards of {type(model).__name__.removeprefix('FSDP')}",
                SAVE_HINT,
            )
        time.sleep(0.01)
        arrived = store.add(key, 0)


def save_sharded(
    model: PreTrainedModel, folder: Any, max_shard_size: int | str, stacked: bool, save_pretrained: Callable
) -> None:
    """Write a sharded model, every rank what it holds; a collective call.

    Rank 0 has transformers write everything but weights (config.json, custom code, ...). Until all is on the disk,
    everything is in a hidden folder inside `folder`, and a checkpoint that was there stays as it was.

    Args:
        model: a transformers model, sharded by FSDP2.
        folder: of the checkpoint. Ranks that do not see it (other hosts) send their weights to those that do.
        max_shard_size: of a file: bytes, or "5GB".
        stacked: keep experts stacked, all names as in memory.
        save_pretrained: transformers' own.

    Raises:
        CheckpointError: on all ranks; a rank could not write.
    """
    folder = Path(folder)
    staging, rank = folder / STAGING, dist.get_rank()
    max_bytes = convert_file_size_to_int(max_shard_size)
    writers = _writers(staging)
    state = _weights_to_save(model)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    groups = group_weights(model, shapes, stacked)
    boxes = boxes_of(state)
    total = sum(shape.numel() * dtype.itemsize for each in groups for shape, dtype in each.targets.values())
    one_file = total <= min(max_bytes, ONE_FILE_BYTES)
    units = plan(groups, shapes, boxes, [0] if one_file else [each for each in writers if boxes[each]])
    files = files_of(units, rank, staging, max_bytes)
    device = saving_of[model].device if model in saving_of else _device(state)
    problem = None
    try:
        write(model, state, shapes, units, boxes, files, device)
    except OSError as error:
        problem = f"rank {rank}: {error}"
    written = gather(([(file.path, list(file.weights)) for file in files], problem))
    problems = [each for _, each in written if each]
    if rank == 0 and not problems:
        try:
            save_pretrained(model, staging, state_dict={})
            parameters = {"total_parameters": model.num_parameters(), "total_size": total}
            publish_weights(staging, folder, [file for of_rank, _ in written for file in of_rank], parameters)
        except OSError as error:
            problems = [f"rank 0: {error}"]
    if problems := _from_rank_0(problems):
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be written: {'; '.join(problems)}", "the checkpoint that was there is as it was"
        )


def _writers(staging: Path) -> list[int]:
    """The ranks that see the folder rank 0 writes in, which is made empty; a collective call."""
    token = None
    if dist.get_rank() == 0:
        token = secrets.token_hex(8)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            (staging / token).touch()
        except OSError as error:
            token = error
    token = _from_rank_0(token)
    if not isinstance(token, str):
        raise CheckpointError(f"{staging.parent} cannot be written in: {token}")
    seen = gather((staging / token).exists())
    if dist.get_rank() == 0:
        (staging / token).unlink()
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        tell(
            f"rank{'s' if len(blind) > 1 else ''} {', '.join(map(str, blind))} cannot see {staging.parent}, which is "
            f"not a folder that all hosts share: the ranks that see it write for them"
        )
    return [rank for rank, sees in enumerate(seen) if sees]


def _weights_to_save(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights as DTensors, without those that transformers leaves out: ignored ones, and copies of tied ones."""
    state = {name: each for name, each in get_model_state_dict(model).items() if isinstance(each, Tensor)}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    tied = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in state and source in state and target != source:
            tied[target] = _same(state[target], state[source])
    same = gather(tied)
    for target in tied:
        if all(of_rank[target] for of_rank in same):
            del state[target]
    return state


def _same(some: Tensor, other: Tensor) -> bool:
    """Whether this rank's shards of two tensors are the same values."""
    if isinstance(some, DTensor) and isinstance(other, DTensor):
        if some.placements != other.placements or some.device_mesh != other.device_mesh:
            return False
        some, other = some.to_local(), other.to_local()
    return some is other or (some.shape == other.shape and torch.equal(some, other))


def _device(state: Mapping[str, Tensor]) -> torch.device:
    kinds = {each.device_mesh.device_type for each in state.values() if isinstance(each, DTensor)}
    return (
        torch.device("cpu") if kinds == {"cpu"} else torch.device(kinds.pop(), torch.accelerator.current_device_index())
    )


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def guard_save_adapters(original: Callable) -> Callable:
    """Around `PeftModel.save_pretrained`: of a sharded model, on all ranks, the adapters are gathered for rank 0."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_sharded(self) or kwargs.get("state_dict") is not None:
            if is_sharded(self) and not kwargs["state_dict"]:  # of a rank but the first
                return None
            return original(self, save_directory, *args, **kwargs)
        _await_all_ranks(self, save_directory)
        weights = gather_adapters(self)
        if dist.get_rank() == 0:
            original(self, save_directory, *args, **{**kwargs, "state_dict": weights})
        dist.barrier()
        return None

    return save_pretrained


def gather_adapters(model: Any) -> dict[str, Tensor]:
    """Of a sharded PEFT model: the weights that PEFT saves, whole, on rank 0; not those of the base. A collective call.

    PEFT itself says which: it is shown the shards, and picks. It may be asked once more with the result.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model)
    picked = [
        each
        for adapter in model.peft_config
        for each in get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter).values()
    ]
    chosen = {id(each) for each in picked}
    if chosen - {id(each) for each in state.values()}:  # made by PEFT of several weights
        whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole
    weights = {}
    for name, each in state.items():
        if id(each) in chosen:
            whole = each.full_tensor() if isinstance(each, DTensor) else each
            if dist.get_rank() == 0:
                weights[name] = whole.cpu()
    return weights


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
