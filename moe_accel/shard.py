"""Expert weights as DTensors: split over `ep` by expert, sharded over `efsdp` by FSDP2, under the names they had.

Stock accelerate shards everything else. `without_experts` takes the expert weights out of the model meanwhile; then
`shard_experts` puts them back, one layer at a time. Optimizers follow, since accelerate maps parameters by name.

Where `efsdp` is one rank there is nothing to gather, and nothing to reduce: FSDP2 would copy all weights in forward and
once more in backward, and the gradients, and take the host's time for that. There the DTensors are all (`_can_stay`);
in mixed precision the experts function casts the weights.

Persistent buffers are taken out as well where `fsdp_cpu_ram_efficient_loading` is on: accelerate 1.15 expects every
entry of a state dict to be a DTensor there, and stops at DeepSeek-V3's `e_score_correction_bias` (accelerate#3898).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_accel.experts import settings_of, stacked_parameters, why_not_gated
from moe_accel.mesh import efsdp_mesh


@dataclass(frozen=True)
class Detached:
    """What was taken out of a model: (module, name, value) of expert parameters and of persistent buffers."""

    parameters: list[tuple[nn.Module, str, nn.Parameter]]
    buffers: list[tuple[nn.Module, str, Tensor]]


def without_experts(model: nn.Module, experts: list[tuple[str, Any]], take_buffers: bool) -> Detached:
    """Take the stacked expert parameters (and persistent buffers) out of the model, in place."""
    parameters = [
        (module, name, parameter) for _, module in experts for name, parameter in list(stacked_parameters(module))
    ]
    buffers = list(_persistent_buffers(model)) if take_buffers else []
    for module, name, _ in parameters:
        del module._parameters[name]
    for module, name, _ in buffers:
        del module._buffers[name]
    return Detached(parameters, buffers)


def restore_buffers(detached: Detached, device: torch.device) -> None:
    """Put the buffers back on `device`, with the values that rank 0 has. A collective call."""
    for module, name, buffer in detached.buffers:
        module._buffers[name] = _from_rank_0(buffer.to(device))


def shard_experts(detached: Detached, sparse_mesh: DeviceMesh, accelerator: Any) -> None:
    """Put the expert parameters back as DTensors over (efsdp, ep). A collective call.

    With `fsdp_cpu_ram_efficient_loading` every slice comes from rank 0, whatever the other ranks hold.
    """
    plugin = accelerator.state.fsdp_plugin
    modules: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {}
    for module, name, parameter in detached.parameters:
        modules.setdefault(module, []).append((name, parameter))
    detached.parameters.clear()  # each layer's full stack can go as soon as its slice is made
    for module, parameters in modules.items():
        others = set(module.parameters())  # sharded by stock accelerate already
        is_whole = not _others_share(sparse_mesh) and _can_stay(module, parameters, accelerator)
        over = sparse_mesh if is_whole else sparse_mesh["ep"]
        while parameters:
            name, full = parameters.pop(0)
            part = _slice(full, sparse_mesh, accelerator.device, plugin.cpu_ram_efficient_loading)
            part = part.to(_kept_dtype(full, accelerator))
            tensor = DTensor.from_local(part, over, [Shard(0)] * over.ndim, run_check=False)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=full.requires_grad))
        if is_whole:
            continue
        fully_shard(
            module,
            mesh=efsdp_mesh(sparse_mesh),
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            shard_placement_fn=lambda parameter: _placement(parameter, sparse_mesh["efsdp"].size()),
            ignored_params=others,
        )


def _others_share(sparse_mesh: DeviceMesh) -> bool:
    """Whether other ranks have the same experts as this one, or parts of them."""
    return sparse_mesh.size() > sparse_mesh["ep"].size()


def _can_stay(module: Any, parameters: list[tuple[str, nn.Parameter]], accelerator: Any) -> bool:
    """Whether FSDP2 can be left out for experts that nobody shares; tells the module the dtype that it would have cast
    weights and tokens to."""
    plugin = accelerator.state.fsdp_plugin
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return False
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    if policy.param_dtype is None:
        return True
    settings = settings_of(module)
    casts = {_kept_dtype(full, accelerator) for _, full in parameters} != {policy.param_dtype}
    if casts and (settings.kernels == "reference" or why_not_gated(module) is not None):
        return False  # these keep for backward what they cast: a copy of all experts of all layers
    settings.dtype = policy.param_dtype
    return True


def _kept_dtype(full: nn.Parameter, accelerator: Any) -> torch.dtype:
    """Of a parameter when it is sharded: as accelerate does it to every other one."""
    return torch.float32 if accelerator.mixed_precision != "no" and full.requires_grad else full.dtype


def _slice(full: Tensor, sparse_mesh: DeviceMesh, device: torch.device, from_rank_0: bool) -> Tensor:
    """This rank's experts of a stack [E,...], on `device`, sharing no memory with it."""
    ep = sparse_mesh["ep"]
    if full.is_meta:  # the values are read later, by those who need them
        return full.detach().chunk(ep.size())[ep.get_local_rank()]
    if not from_rank_0:
        return full.detach().chunk(ep.size())[ep.get_local_rank()].to(device, copy=True)
    part = torch.empty(full.shape[0] // ep.size(), *full.shape[1:], dtype=full.dtype, device=device)
    # Rank 0's `ep` group splits the stack; then each of its ranks hands its slice to those with the same experts.
    outer = [name for name in (sparse_mesh.mesh_dim_names or ()) if name != "ep"]
    if all(sparse_mesh.get_local_rank(name) == 0 for name in outer):
        parts = None
        if dist.get_rank() == 0:
            parts = [each.to(device).contiguous() for each in full.detach().chunk(ep.size())]
        dist.scatter(part, parts, group_src=0, group=ep.get_group())
    for at in reversed(range(len(outer))):
        if all(sparse_mesh.get_local_rank(name) == 0 for name in outer[:at]):
            dist.broadcast(part, group_src=0, group=sparse_mesh.get_group(outer[at]))
    return part


def _placement(parameter: Tensor, efsdp_size: int) -> Shard | None:
    """Shard by expert; by rows where there are fewer local experts than ranks to share them."""
    num_local_experts, num_rows = parameter.shape[0], parameter.shape[1]
    if isinstance(parameter, DTensor):
        num_local_experts = parameter.to_local().shape[0]
    return Shard(1) if num_local_experts % efsdp_size and num_rows % efsdp_size == 0 else Shard(0)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield module, name, buffer


def _from_rank_0(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=0)
    return tensor
