"""The parameters of a transformers experts module, as matrices that multiply rows from the right.

Sizes: e experts on this rank, H hidden, U up rows (twice the inner size I with a gate), P sorted pairs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_accel.experts.scale import scale_gradient


def stacked_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that hold one slice per expert, first dimension num_experts: what expert parallelism shards."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2 and parameter.shape[0] == module.num_experts:
            yield name, parameter


def up_weight(module: Any) -> tuple[Tensor, Tensor | None]:
    """First projection [e,H,U] and its bias [e,U] or None."""
    return _linear(module, projections(module)[0])


def down_weight(module: Any) -> tuple[Tensor, Tensor | None]:
    """Second projection [e,I,H] and its bias [e,H] or None."""
    return _linear(module, projections(module)[1])


def hidden_size(module: Any) -> int:
    """H of an experts module."""
    return getattr(module, projections(module)[0]).shape[1 if module.is_transposed else 2]


def projections(module: Any) -> tuple[str, str]:
    """Names of the parameters of a module's two projections."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _linear(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    weight = local(getattr(module, name))
    bias = local(getattr(module, f"{name}_bias")) if module.has_bias else None
    return (weight if module.is_transposed else weight.transpose(1, 2)), bias


def local(tensor: Tensor) -> Tensor:
    """This rank's own experts of a stack sharded over `ep`; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def activate(module: Any, up: Tensor) -> Tensor:
    """[P,U] -> [P,I] by the module's own gate (`_apply_gate`) or activation."""
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def post_norm(module: Any, rows: Tensor, gradient_scale: float) -> Tensor:
    """`post_expert_norm` of the families that have one, before routing weights are applied.

    Its weight is shared by all experts, so it is no expert's parameter: the gradient scale that the experts of an `ep`
    group get (see `scale.py`) is taken off it again.
    """
    norm = module.post_expert_norm
    parameters = {name: scale_gradient(each, gradient_scale) for name, each in norm.named_parameters()}
    return torch.func.functional_call(norm, parameters, (rows,))


def has_post_norm(module: nn.Module) -> bool:
    """Whether the class normalises each expert's output (transformers >= 5.23)."""
    return getattr(module, "has_post_expert_norm", False)
