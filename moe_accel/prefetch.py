"""Which all-gathers FSDP2 starts early where experts are sharded apart from their layer: explicit prefetch lists.

By itself FSDP2 prefetches in backward whatever finished before in forward, one module at a time: experts i, layer i,
experts i+1, layer i+1. So the start of layer i in backward asks for experts i, which it needs a moment later (they are
nearly the last thing that forward computed), and experts i, with all the work to hide it, ask for the attention of
layer i-1, which is small. And an all-gather does not start before the copy-out of the module that asked for it, so a
host that runs ahead does not help. The lists turn that around:

    forward    layer i    asks for its own experts and for layer i+1: beside its attention
    backward   layer i    asks for its own experts (there already, but in the first), layer i-1 and its experts

An all-gather asked for twice is made once, one that nobody came for is dropped at the end of backward. The price is
memory: in backward two layers' experts are there at once.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from moe_accel.experts import is_decorated


def prefetch_experts(model: nn.Module) -> None:
    """Set the lists of all layers that FSDP2 shards.

    Args:
        model: sharded by FSDP2, the experts on a mesh of their own.
    """
    for layers in layer_lists(model):
        inside = [[each for each in layer.modules() if _is_apart(each)] for layer in layers]
        for at, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch([*inside[at], *layers[at + 1 : at + 2]])
            before = [layers[at - 1], *inside[at - 1]] if at else []
            layer.set_modules_to_backward_prefetch([*inside[at], *before])


def layer_lists(model: nn.Module) -> list[list[Any]]:
    """Layers that are FSDP modules, in order, list by list; only lists with experts in them."""
    lists: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        parent, _, last = name.replace("._checkpoint_wrapped_module", "").rpartition(".")
        if last.isdecimal() and isinstance(module, FSDPModule):
            lists.setdefault(parent, {})[last] = module  # accelerate shards a checkpoint wrapper, too: what is inside
    found = [list(layers.values()) for layers in lists.values()]
    return [layers for layers in found if any(_is_apart(each) for layer in layers for each in layer.modules())]


def _is_apart(module: Any) -> bool:
    return is_decorated(module) and isinstance(module, FSDPModule)
