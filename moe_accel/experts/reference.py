"""The experts as a loop: slow, true, and what every faster form is tested against.

Sizes: R rows, H hidden, K top-k, e local experts.
"""

from typing import Any

import torch
from torch import Tensor

from moe_accel.experts.adapters import Factors
from moe_accel.experts.weights import activate, down_weight, has_post_norm, post_norm, up_weight


def reference_experts(
    module: Any,
    x: Tensor,
    choices: Tensor,
    weights: Tensor,
    norm_scale: float = 1.0,
    adapters: tuple[Factors | None, Factors | None] = (None, None),
) -> Tensor:
    """Weighted sum of each row's experts: x [R,H], choices [R,K] (local expert or -1), weights [R,K] -> [R,H].

    Accumulates in fp32 at least, returns the dtype of x. `norm_scale`: see `weights.post_norm`. `adapters`: of the two
    projections, see `adapters.factors`.
    """
    (up, up_bias), (down, down_bias) = up_weight(module), down_weight(module)
    up, down = (
        weight if of is None else weight + of[0] @ of[1] for weight, of in zip((up, down), adapters, strict=True)
    )
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in range(up.shape[0]):
        row, choice = torch.where(choices == expert)
        y = x[row] @ up[expert]
        y = y if up_bias is None else y + up_bias[expert]
        y = activate(module, y) @ down[expert]
        y = y if down_bias is None else y + down_bias[expert]
        y = post_norm(module, y, norm_scale) if has_post_norm(module) else y
        out = out.index_add(0, row, (y * weights[row, choice, None]).to(out.dtype))
    return out.to(x.dtype)
