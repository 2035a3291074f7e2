"""prepare(): every rank reads the parts of the checkpoint that are its shards, and nothing else.

    settle        all ranks agree on what is still pending; what only some have read is read by all
    by_shards     pending parameters go to the meta device, where `fully_shard` cuts them without memory; after that
                  each shard gets memory on its device and is read into it
    read_onto     without FSDP2: whole, one after the other, onto the device; read_all_onto: on all ranks

No collective runs while files are read. A rank that cannot read tells the others afterwards, so that all of them stop.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Replicate
from tqdm import tqdm

from moe_accel.errors import CheckpointError
from moe_accel.ranks import gather, meet
from moe_accel.streaming.pending import Pending, become, materialise, pending_parameters
from moe_accel.streaming.source import Job, Part, Source, fill, num_bytes_of, part_jobs, whole_jobs

Sources = dict[tuple[nn.Module, str], Source]
"""By the module and the name under which it has the parameter."""


def settle(model: nn.Module) -> bool:
    """Make the same parameters pending on all ranks; whether there are any. A collective call.

    What a script has touched on one rank alone is read on all of them. Values that are no longer those of the
    checkpoint (edited, newly initialised, adapters) then come from rank 0.

    Raises:
        CheckpointError: on all ranks that came here, where one failed in `from_pretrained`, or cannot read a file.
    """
    meet()
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, Pending)]
    if not _is_distributed():
        return bool(names)
    gathered = gather(names)
    if not any(gathered):
        return False
    common = set(gathered[0]).intersection(*gathered[1:])
    agree_on_reading(lambda: [materialise(each) for each in _unsettled(model, common)])
    return bool(common)


def _unsettled(model: nn.Module, common: set[str]) -> list[Pending]:
    return [each for name, each in model.named_parameters() if isinstance(each, Pending) and name not in common]


def agree_on_reading(read: Callable[[], Any]) -> None:
    """Call `read()`; if it fails on any rank, raise on all of them. A collective call.

    Raises:
        CheckpointError: with the message of the first rank that failed. A rank whose own failure is of another kind
            (no memory, say) raises that.
    """
    failure: Exception | None = None
    try:
        read()
    except Exception as error:  # whatever it is: the others wait for this rank
        failure = error
    if _is_distributed():
        for rank, said in enumerate(gather(_what_failed(failure))):
            if said is not None and (failure is None or isinstance(failure, CheckpointError)):
                raise CheckpointError(f"rank {rank}: {said[0]}", said[1]) from failure
    if failure is not None:
        raise failure


def _what_failed(failure: Exception | None) -> tuple[str, str | None] | None:
    """(message, hint) for the other ranks."""
    if failure is None or isinstance(failure, CheckpointError):
        return failure and (failure.message, failure.hint)
    return f"its part of the checkpoint cannot be read: {type(failure).__name__}: {failure}", None


def take_sources(model: nn.Module) -> Sources:
    """Make pending parameters plain ones on the meta device, the same Python objects; returns their sources."""
    found = list(pending_parameters(model))
    taken: Sources = {(module, name): parameter.source for module, name, parameter in found}
    for parameter in {id(each): each for _, _, each in found}.values():
        address = parameter.address
        become(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        setattr(parameter, "data_ptr", lambda address=address: address)  # noqa: B010 accelerate tells them apart by it
    return taken


@contextmanager
def by_shards(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """While accelerate shards the model inside, its pending parameters have no values; afterwards their shards have.

    accelerate's own way of sparing memory, all from rank 0, is switched off meanwhile. A collective call.
    """
    plugin = accelerator.state.fsdp_plugin
    configured = plugin.cpu_ram_efficient_loading
    taken = take_sources(model)
    share_rest(model)  # what is left with values; a pending parameter would be read for it
    plugin.cpu_ram_efficient_loading = False
    try:
        yield
    finally:
        plugin.cpu_ram_efficient_loading = configured
    fill_shards(taken, accelerator)


def read_onto(model: nn.Module, device: torch.device) -> None:
    """Read every pending parameter, whole, onto a device."""
    found = {id(each): each for _, _, each in pending_parameters(model)}
    values = [torch.empty(each.shape, dtype=each.source.dtype, device=device) for each in found.values()]
    both = zip(found.values(), values, strict=True)
    jobs = list(chain.from_iterable(whole_jobs(each.source, value) for each, value in both))
    with _bar(sum(map(num_bytes_of, jobs)), is_main=True) as bar:
        fill(jobs, bar.update)
    for parameter, value in zip(found.values(), values, strict=True):
        become(parameter, value)


def read_all_onto(models: list[nn.Module], device: torch.device) -> None:
    """Read every pending parameter of these models onto the device of each rank. A collective call.

    Raises:
        CheckpointError: on all ranks that came here, where one failed in `from_pretrained`, or cannot read a file.
    """
    meet()
    agree_on_reading(lambda: [read_onto(model, device) for model in models])


def _bar(num_bytes: int, is_main: bool) -> Any:
    hidden = not is_main or not num_bytes or os.environ.get("RANK", "0") != "0"
    hidden = hidden or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1"
    return tqdm(total=num_bytes, desc="Loading shards", unit="B", unit_scale=True, disable=hidden)


@torch.no_grad()
def share_rest(model: nn.Module) -> None:
    """Give the parameters and buffers that have values those of rank 0: each rank drew its own. A collective call."""
    if not _is_distributed():
        return
    kept = [each for each in model.parameters() if not each.is_meta and not isinstance(each, DTensor)]
    kept += [each for each in model.buffers() if not each.is_meta]
    backend = dist.get_backend()
    for each in kept:
        sent = each.detach()
        if "nccl" in backend and "gloo" not in backend and sent.device.type == "cpu":
            sent = sent.cuda()
        sent = sent.contiguous()
        dist.broadcast(sent, src=0)
        each.data.copy_(sent)


def fill_shards(taken: Sources, accelerator: Any) -> None:
    """Give every sharded parameter on the meta device memory, and its part of the checkpoint. A collective call.

    Raises:
        CheckpointError: on all ranks, where one of them cannot read a file.
    """
    offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    device = torch.device("cpu") if offloads else accelerator.device
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept, so that its id stays its own
    jobs: list[Job] = []
    for (module, name), source in taken.items():
        old = module._parameters[name]
        if old is None:
            continue
        if id(old) not in made:
            part = local_part(old)
            made[id(old)] = (old, _with_memory(old, part, device))
            jobs += part_jobs(source, part, _local(made[id(old)][1]))
        module._parameters[name] = made[id(old)][1]

    def read() -> None:
        with _bar(sum(map(num_bytes_of, jobs)), accelerator.is_main_process) as bar:
            fill(jobs, bar.update)

    agree_on_reading(read)


def _with_memory(old: nn.Parameter, part: Part, device: torch.device) -> nn.Parameter:
    """`old`, a parameter on the meta device whose shard is `part`, on `device`; its values are not set yet."""
    local = _local(old)
    value: Tensor = torch.empty(local.shape, dtype=local.dtype, device=device)
    shape = tuple(stop - start for start, stop in part)
    assert shape == tuple(local.shape) or not value.numel(), f"part {part} of {old.shape} is not a shard {local.shape}"
    if isinstance(old, DTensor):
        value = DTensor.from_local(
            value, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    return nn.Parameter(value, requires_grad=old.requires_grad)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_part(parameter: Tensor) -> Part:
    """Which part of the whole tensor this rank's shard is.

    Plain shards are cut first, in the order of the mesh, then strided ones: FSDP2 shards over `efsdp` what `ep` has cut
    already, and says so with a strided placement.
    """
    part = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(part)
    placed = [(axis, each) for axis, each in enumerate(parameter.placements) if not isinstance(each, Replicate)]
    placed.sort(key=lambda each: type(each[1]).__name__ == "_StridedShard")
    coordinate: Any = parameter.device_mesh.get_coordinate()
    for axis, placement in placed:
        dim = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
        start, stop = part[dim]
        size = -(-(stop - start) // parameter.device_mesh.size(axis))
        low = min(stop, start + coordinate[axis] * size)
        part[dim] = (low, min(stop, low + size))
    return tuple(part)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
