"""Which of `te_parts` a model can have; and what is beside the experts and the rest of a block (`block.py`): causal
attention, and large linear layers in FP8.

FP8 is for attention's projections, shared experts and dense blocks. Not for the output layer, whose product is a part
of the loss, nor for adapters. A layer keeps its parameters and their names; in evaluation it computes as before, as
with accelerate's own FP8.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_accel.kernels import te, te_fp8
from moe_accel.kernels.device import as_autocast
from moe_accel.kernels.te_parts import OF_EXPERTS
from moe_accel.padding.attention import let_te_attend
from moe_accel.swap import become, is_bare

ADAPTER = "lora_"
"""How PEFT's names of an adapter's own layers begin."""


class Computed(NamedTuple):
    """How a model is to be trained.

    Attributes:
        precision: accelerate's mixed_precision.
        by_fsdp2: whether FSDP2 casts weights to it, rather than autocast products.
        compiled: whether torch.compile is to compile the model.
    """

    precision: str = "no"
    by_fsdp2: bool = False
    compiled: bool = False


def choose(model: Any, parts: Sequence[str], computed: Computed) -> tuple[list[str], list[str]]:
    """Those of `te_parts` that TransformerEngine can compute of a model, and lines about the others.

    All of them look at dtypes as they come, too: what is said of fp32 here is for the reader.
    """
    taken, said = list(parts), []
    casts = computed.precision in ("bf16", "fp16")
    weights = {each.dtype for each in model.parameters() if each.is_floating_point()}
    if computed.compiled and (left := [each for each in taken if each not in OF_EXPERTS]):
        taken = [each for each in taken if each in OF_EXPERTS]
        said.append(f"{', '.join(left)} not by TransformerEngine: torch.compile is to compile the model")
    if not casts and not weights.intersection(te.DTYPES):
        nothing = "nothing but routers" if "router" in taken else "nothing"
        said.append(f"the model is in fp32, of which TransformerEngine computes {nothing} outside of autocast")
    of_norms = [getattr(each, "weight", None) for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    wide = [each for each in of_norms if each is not None and each.dtype not in te.DTYPES]
    if "norms" in taken and wide and not (casts and computed.by_fsdp2):
        said.append(f"{len(wide)} of {len(of_norms)} norms not by TransformerEngine: their weights are in fp32")
        if len(wide) == len(of_norms):
            taken.remove("norms")
    return taken, said


def install(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Let TransformerEngine attend, and compute large linear layers, where `parts` says so; lines for the report."""
    said = []
    if "attention" in parts:
        asked = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if asked != "sdpa":
            said.append(f"no attention by TransformerEngine: attn_implementation is {asked}, not sdpa")
        else:
            num_layers = let_te_attend(model)
            how = (
                f"attention by TransformerEngine in {num_layers} of the layers, where it is causal and without dropout"
            )
            said.append(how if num_layers else "no attention by TransformerEngine: no layer is causal")
    return said + ([compute_in_fp8(model)] if "fp8" in parts else [])


def compute_in_fp8(model: nn.Module) -> str:
    """Let the large linear layers of one model compute in FP8 in training; returns what was done, in words."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    others = set() if output is None else set(output.modules())  # with what PEFT wraps it in
    layers: list[Any] = [
        each
        for name, each in model.named_modules()
        if each not in others
        and (type(each) is nn.Linear or isinstance(each, _InFP8))
        and not any(part.startswith(ADAPTER) for part in name.split("."))
    ]
    chosen = [each for each in layers if is_bare(each) and te_fp8.is_worth(each.weight)]
    for each in chosen:
        become(each, _InFP8)
    of_these = f"those of {te_fp8.WORTH:,} weights and more"
    return f"{len(chosen)} of {len(layers)} linear layers in FP8: {of_these}"


class _InFP8(nn.Module):
    """What a linear layer does instead."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """In FP8 in training, where it can be; else its own."""
        if not self.training or torch.compiler.is_compiling():
            return super().forward(input)
        given = input, self.weight, *([] if self.bias is None else [self.bias])
        if any(type(each) not in (Tensor, nn.Parameter) for each in given):
            return super().forward(input)
        x, weight, *bias = as_autocast(*given)
        if not te_fp8.takes(x, weight):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return te_fp8.linear(x, weight, bias[0] if bias else None)
