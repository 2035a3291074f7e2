"""Floating-point operations of one training step, counted on the model itself.

A weight that multiplies every token costs 2 operations a token in forward, 2 for the gradient of its input, and 2 for
its own gradient where it is trained: 6 a trained weight, 4 a frozen one (PaLM, Chowdhery et al. 2022, appendix B). Of
stacked experts, and of adapters on them, K of E count. An embedding is a lookup and counts nothing; an output layer
does. Attention multiplies every query with half of the keys, being causal, and every score with as many values:

    forward = layers * tokens * heads * 2 * keys * (d_qk + d_v),  keys = S / 2, and w - w^2 / (2 S) in a window w < S

and three times that with backward, trained or not; of d_qk = d_v = d and full attention this is the usual
`12 * layers * heads * d * S * tokens / 2`. Mamba's scan is counted as its recurrence: 6 operations an element of the
state a token, three times with backward. Frozen weights of the first layer count 4 like all others, though nobody may
want the gradient of their input. Recompute (checkpointing) counts nothing: it is a cost, not work.
"""

from typing import Any

from torch import nn

from moe_accel.bench.routing import experts_children

FORWARD, INPUT, WEIGHT = 2, 2, 2
"""Operations an element of a weight a token: the product, the gradient of its input, its own gradient."""


def step_flops(model: nn.Module, tokens: int, seq_len: int, causal: bool = True) -> float:
    """Operations of forward and backward of `model` (a model, or one of its blocks) on `tokens` tokens.

    Args:
        model: of plain transformers or PEFT; not compiled, not prepared.
        tokens: of all sequences together.
        seq_len: tokens of a sequence, S above.
        causal: False counts attention over all keys, as a kernel without a causal form computes it.
    """
    weights = sum(
        parameter.numel() * share * (FORWARD + INPUT + (WEIGHT if parameter.requires_grad else 0))
        for parameter, share in multiplied(model)
    )
    return tokens * (weights + 3 * sum(_mixing(module, seq_len, causal) for module in model.modules()))


def active_parameters(model: nn.Module) -> float:
    """Weights that multiply each token; embeddings not counted."""
    return sum(parameter.numel() * share for parameter, share in multiplied(model))


def multiplied(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Every parameter that multiplies tokens, with the share of its elements that multiplies each of them."""
    found: dict[nn.Parameter, float] = {}
    for block, outer in experts_children(model):
        inner = stack(outer)
        share = top_k(block) / inner.num_experts
        found |= {each: share for each in outer.parameters() if each.ndim > 2 or each not in set(inner.parameters())}
        found |= {each: 0.0 for each in inner.parameters() if each.ndim <= 2}  # biases
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                found.setdefault(parameter, 1.0)
    return [(parameter, share) for parameter, share in found.items() if share]


def top_k(block: Any) -> int:
    """Experts of a token, as the block's router says."""
    for module in block.modules():
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    raise ValueError(f"{type(block).__name__} has no router that says top_k")


def stack(experts: nn.Module) -> Any:
    """The module that holds the experts' weights, inside of PEFT's wrappers or somebody else's class."""
    return next(module for module in experts.modules() if isinstance(getattr(module, "down_proj", None), nn.Parameter))


def _mixing(module: Any, seq_len: int, causal: bool) -> float:
    """Operations a token, forward, of what mixes tokens: attention cores and Mamba scans."""
    if hasattr(module, "ssm_state_size") and hasattr(module, "num_heads"):
        return 6 * module.num_heads * module.head_dim * module.ssm_state_size
    if not (type(module).__name__.endswith("Attention") and hasattr(module, "config")):
        return 0
    config, window = module.config, getattr(module, "sliding_window", None) or seq_len
    window = min(window, seq_len)
    keys = window - window**2 / (2 * seq_len) if causal else seq_len
    d_qk = getattr(config, "qk_head_dim", None) or module.head_dim
    d_v = getattr(config, "v_head_dim", None) or module.head_dim
    return config.num_attention_heads * 2 * keys * (d_qk + d_v)
