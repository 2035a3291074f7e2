"""Attention, and blocks with experts, as CUDA graphs: one launch each where the host takes the time for some hundred.

With sequences of one length an attention module gets the same shapes in every step. So it is computed as ever twice,
and recorded in the third step, forward and backward, each as a graph of everything that is started for it. Its calls
of the same kind copy their inputs to where the graph reads them, and start it. Ragged batches and packed rows have
other numbers of tokens, or sequences, in every step: recorded is for the most of them, see `sizes.py`. Experts get
other numbers of rows every time: in expert parallelism whole blocks are recorded in tensors that do not depend on it,
see `blocks.py`.

A graph knows addresses and nothing else. What a call depends on besides its tensors is looked at every time: that
parameters are those that were recorded, where they were, and wanted gradients or not, that nobody changed an attribute
(PEFT turns adapters off by one), replaced a part or put a hook in. Anything else is computed as ever: other shapes, a
mask, more tokens than there is room for, dropout, a cache, checkpointing, evaluation, a second forward before the first
one's backward. In the step in which it is recorded, and in the next one unless it was the last, it is played beside the
module's own computation, which is used, and by itself from then on if both gave the same: all layers in one step, so
that what one's graphs do to the memory of another is seen; blocks with experts in the next one alone. A trial holds
twice what is kept for backward.

FSDP2 frees gathered parameters and gathers them anew: `keep_in_place` leaves those of recorded modules their memory.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moe_accel import experts
from moe_accel.dispatch import AllGather
from moe_accel.graphs.agreement import Agreement
from moe_accel.graphs.blocks import BlockGraphs, let_nccl_record, outlive_none, why_no_blocks
from moe_accel.graphs.module import CALLS, LONG, OPEN, OTHER_CALLS, PASSED_BY, RECORDINGS, Graphed, Graphs
from moe_accel.graphs.record import Recording
from moe_accel.graphs.recorder import Recorder
from moe_accel.graphs.sizes import MOST_TOKENS, most_alike
from moe_accel.ranks import urgent
from moe_accel.report import short
from moe_accel.swap import become


def install(
    model: nn.Module,
    device: torch.device,
    compiled: bool,
    gathers: bool,
    why_not: str | None = "",
) -> list[str]:
    """Let the attention of one model be recorded, and blocks with experts; lines for the report.

    Args:
        model: of transformers.
        device: where it is trained.
        compiled: whether torch.compile is to compile it.
        gathers: whether FSDP2 gathers its parameters.
        why_not: reason why their blocks are not to be recorded; empty: nobody asked for it; None: they are.
    """
    if device.type != "cuda":
        return ["no CUDA graphs: no GPU"]
    if compiled:
        return ["no CUDA graphs: torch.compile is to compile the model"]
    attention = record_attention(model, Recorder())
    blocks = record_blocks(model, Recorder()) if why_not is None else []
    said = ["no CUDA graphs of attention: none of transformers that is causal"]
    if attention:
        leave_cache_out(model)
        of_experts = {each for _, module in experts.find_experts(model) for each in module.parameters()}
        kept = {each for module in (*attention, *blocks) for each in module.parameters()} - of_experts
        stays = f"; FSDP2 leaves {short(sum(each.numel() for each in kept))} weights gathered" if gathers else ""
        said = [f"attention of {len(attention)} layers as CUDA graphs, from the fifth of equal steps on{stays}"]
    if blocks:
        tokens = f"{most_alike(dist.get_world_size()):,} tokens a rank at most, {MOST_TOKENS:,} where that changes"
        said.append(f"blocks with experts of {len(blocks)} layers likewise, for {tokens}")
    elif why_not is None or why_not:
        said.append(
            f"no CUDA graphs of blocks with experts: {why_not or 'attention is in them, or a forward of their own'}"
        )
    return said


def leave_cache_out(model: nn.Module) -> None:
    """Let a model of transformers fill no cache in training unless it is asked to, which its config may by default."""
    takes = inspect.signature(model.forward).parameters
    known = "use_cache" in takes or any(each.kind == each.VAR_KEYWORD for each in takes.values())
    if known and _without_cache not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)


def _without_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook."""
    by_place = len(args) > 1 and "use_cache" in list(inspect.signature(model.forward).parameters)[: len(args)]
    if model.training and torch.is_grad_enabled() and not by_place:
        kwargs = {"use_cache": False} | kwargs
    return args, kwargs


def record_attention(model: nn.Module, recorder: Recorder) -> list[Any]:
    """Let all attention modules of transformers that say they are causal be recorded; returns them."""
    found: list[Any] = [module for module in model.modules() if getattr(module, "is_causal", None) is True]
    found = [module for module in found if "forward" not in vars(module)]
    for module in found:
        vars(module).setdefault("_moe_accel_graphs", Graphs(recorder))
        become(module, Graphed)
    return found


def record_blocks(model: nn.Module, recorder: Recorder) -> list[Any]:
    """Let the blocks be recorded in which experts of expert parallelism are, unless attention is in them, too.

    By a recorder of their own, and so in other memory than attention, which each rank records for itself.
    """
    let_nccl_record()
    agreement, blocks = Agreement(recorder), []
    for name, module in experts.find_experts(model):
        block, _ = experts.block_of(model, name)
        settings = experts.settings_of(module)
        dispatcher: Any = settings.dispatcher
        if "forward" in vars(block) or any(isinstance(each, Graphed) for each in block.modules()):
            continue
        settings.of_known_sizes = AllGather(urgent(dispatcher.group), dispatcher.num_local_experts)
        vars(block)["_moe_accel_graphs"] = BlockGraphs(agreement)
        become(block, Graphed)
        blocks.append(block)
    if blocks:
        model.register_forward_pre_hook(agreement.begin)
        outlive_none(agreement)
    return blocks


def keep_in_place(model: nn.Module) -> None:
    """Let FSDP2 leave gathered parameters of recorded modules their memory, from one step to the next."""
    graphs = {
        part: vars(module)["_moe_accel_graphs"]
        for module in model.modules()
        if isinstance(module, Graphed)
        for part in module.modules()
    }
    for module in model.modules():
        for parameter in _gathered(module) if isinstance(module, FSDPModule) else ():
            owner = graphs.get(parameter._module_info.module)
            if owner is not None:
                parameter.free_unsharded_param = _keep
                owner.gathered.append(parameter)


def _gathered(module: FSDPModule) -> Iterator[Any]:
    """FSDP2's own objects for the parameters that a module gathers; torch 2.11 has them in one group."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        yield from group.fsdp_params if group is not None else ()


def _keep() -> None:
    """Instead of freeing."""


__all__ = [
    "CALLS",
    "LONG",
    "MOST_TOKENS",
    "OPEN",
    "OTHER_CALLS",
    "PASSED_BY",
    "RECORDINGS",
    "Graphed",
    "Graphs",
    "Recorder",
    "Recording",
    "install",
    "keep_in_place",
    "leave_cache_out",
    "record_attention",
    "record_blocks",
    "why_no_blocks",
]
