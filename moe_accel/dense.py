"""Large linear layers in FP8, where that is asked for: attention's, shared experts', dense blocks'. Not the output
layer, whose product is a part of the loss.

A layer keeps its parameters and their names. In evaluation it computes as before, as with accelerate's own FP8.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.kernels import te_fp8
from moe_accel.kernels.device import as_autocast
from moe_accel.swap import become, is_bare


def install(model: nn.Module) -> str:
    """Let the large linear layers of one model compute in FP8 in training; returns what was done, in words."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    layers: list[Any] = [each for each in model.modules() if type(each) is nn.Linear or isinstance(each, _InFP8)]
    chosen = [each for each in layers if each is not output and is_bare(each) and te_fp8.is_worth(each.weight)]
    for each in chosen:
        become(each, _InFP8)
    return f"{len(chosen)} of {len(layers)} linear layers in FP8: those of {te_fp8.WORTH:,} weights and more"


class _InFP8(nn.Module):
    """What a linear layer does instead."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """In FP8 in training, where it can be; else its own."""
        if not self.training or torch.compiler.is_compiling():
            return super().forward(x)
        given = x, self.weight, *([] if self.bias is None else [self.bias])
        if any(type(each) not in (Tensor, nn.Parameter) for each in given):
            return super().forward(x)
        x_, weight, *bias = as_autocast(*given)
        if not te_fp8.takes(x_, weight):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return te_fp8.linear(x_, weight, bias[0] if bias else None)
