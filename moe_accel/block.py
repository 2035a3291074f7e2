"""The rest of a block: norms, rotary embeddings and routers that are provably the usual ones compute by our kernels.

Provably: before anything is replaced, the model's own function and ours get the same random numbers on the CPU, and
must agree. A norm, rotation or router of another kind stays as it is.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.experts.router_proof import fuse_router
from moe_accel.hooks import wrap
from moe_accel.kernels import te_norm, te_router
from moe_accel.kernels.device import HAS_TRITON, use_triton
from moe_accel.kernels.rms_norm import normalise_torch, rms_norm
from moe_accel.kernels.rope import rotate, rotate_torch
from moe_accel.report import Choice
from moe_accel.swap import become, own_class

ROTATION = "apply_rotary_pos_emb"
ROUTERS = r"(Router|MoE\w*Gate)$"
"""Classes to try."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_in_fused_attention: ContextVar[bool] = ContextVar("in_fused_attention", default=False)


def install(model: nn.Module, device: torch.device, precision: str = "no", parts: Sequence[str] = ()) -> Choice:
    """Replace the norms, rotations and routers of a model that is trained on `device`.

    Args:
        model: the transformers model.
        device: where it is trained.
        precision: accelerate's mixed_precision, under whose autocast forward will run.
        parts: of `te_parts`: what TransformerEngine is to compute, `norms` and `router` here.

    Returns:
        What was done and why.
    """
    if device.type != "cuda" or not HAS_TRITON:
        return Choice("native", f"kernels need {'triton' if device.type == 'cuda' else 'a GPU'}")
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    fused = [module for module in norms if fuse_norm(module, te_norm.rms_norm if "norms" in parts else rms_norm)]
    turned = fuse_rotations(model)
    num_routed, routers = fuse_routers(model, AUTOCAST.get(precision), "router" in parts)
    said = f"{len(fused)} of {len(norms)} norms, rotary embeddings {'too' if turned else 'of their own kind stay'}"
    return Choice("fused" if fused or turned or num_routed else "native", f"{said}, {routers}")


def fuse_routers(model: nn.Module, autocast: torch.dtype | None, by_te: bool = False) -> tuple[int, str]:
    """Let the routers of one model compute with the kernels, where they are proven to; returns how many do, and words.

    A router that is a part of its block's forward cannot be replaced. `by_te`: with TransformerEngine's, those whose
    rule it has.
    """
    routers = [module for module in model.modules() if re.search(ROUTERS, type(module).__name__)]
    function = te_router.route if by_te else None
    proofs = [(type(module).__name__, fuse_router(module, function)) for module in routers]
    staying = sorted({name for name, proof in proofs if proof is None})
    rounding = sorted({name for name, proof in proofs if proof is not None and not proof.computes(autocast)})
    said = [f"{', '.join(staying)} of its own kind stays"] if staying else []
    said += [f"{', '.join(rounding)} stays under autocast"] if rounding else []
    fused = [proof for _, proof in proofs if proof is not None and proof.computes(autocast)]
    num_fused = len(fused)
    if by_te:
        said = [f"{sum(te_router.takes(proof.rule) for proof in fused)} of them by TransformerEngine", *said]
    if not routers:
        return 0, "routers inside of their blocks stay"
    return num_fused, f"{num_fused} of {len(routers)} routers{': ' + ', '.join(said) if said else ''}"


def fuse_norm(module: Any, function: Callable[..., Tensor] = rms_norm) -> bool:
    """Let one norm compute with `rms_norm`, or another of its contract, if it is one; returns whether it does."""
    if "_moe_accel_norm" in vars(module):
        _, *others = module._moe_accel_norm
        module._moe_accel_norm = function, *others
        return True
    offset = None if "forward" in vars(module) else offset_of(module)
    if offset is not None:
        module._moe_accel_norm = function, _eps(module), offset
        become(module, _FusedNorm)
    return offset is not None


def offset_of(module: nn.Module) -> float | None:
    """What a norm adds to its weight: 0, or 1 as in Gemma; None where it is no RMSNorm with one weight."""
    eps, weight = _eps(module), getattr(module, "weight", None)
    takes = list(inspect.signature(type(module).forward).parameters)
    plain = {name for name, _ in module.named_parameters()} == {"weight"} and not list(module.buffers())
    if not isinstance(eps, float) or not plain or weight is None or weight.ndim != 1 or len(takes) != 2:
        return None
    generator = torch.Generator().manual_seed(0)
    x, probe = (torch.randn(*shape, generator=generator) for shape in ((3, weight.shape[0]), weight.shape))
    original = types.MethodType(type(module).forward, module)
    saved, module._parameters["weight"] = module._parameters["weight"], nn.Parameter(probe, requires_grad=False)
    try:
        expected = original(x)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return None
    finally:
        module._parameters["weight"] = saved
    for offset in (0.0, 1.0):
        found = normalise_torch(x, probe, eps, offset)[0]
        if isinstance(expected, Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return offset
    return None


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _FusedNorm(nn.Module):
    """What a norm does instead."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The kernel, where it is one tensor on a GPU; else the norm's own."""
        if torch.compiler.is_compiling():  # the compiler fuses a norm by itself
            return super().forward(*args, **kwargs)
        if len(args) != 1 or kwargs:  # its own name for x
            args = inspect.signature(super().forward).bind(*args, **kwargs).args
        (x,) = args
        if not use_triton(x):
            return super().forward(x)
        function, eps, offset = self._moe_accel_norm
        return function(x, self.weight, eps, offset)


def fuse_rotations(model: nn.Module) -> bool:
    """Let the attention of one model rotate with `rotate`, where it rotates as Llama does; returns whether any does.

    Attention finds its rotation in its modeling file, which other models share: what is put there looks whether it was
    called from a module of a model that was prepared. The modules' own hooks say so, in recompute too.
    """
    proven: dict[Any, bool] = {}
    for module in model.modules():
        forward: Any = inspect.unwrap(own_class(module).forward)  # pyright: ignore
        file = sys.modules.get(getattr(forward, "__module__", ""))
        if ROTATION not in getattr(getattr(forward, "__code__", None), "co_names", ()) or file is None:
            continue
        if file not in proven:
            proven[file] = fuse_rotation(file)
        if proven[file] and not hasattr(module, "_moe_accel_rotates"):
            module._moe_accel_rotates = True  # pyright: ignore[reportArgumentType]
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)
    return any(proven.values())


def _enter(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _in_fused_attention.set(True)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _in_fused_attention.set(False)


def fuse_rotation(module: Any) -> bool:
    """Let a modeling file rotate with `rotate` inside of fused attention, if it rotates q and k as Llama does.

    Returns whether it does.
    """
    function = getattr(module, ROTATION, None)
    if function is None:
        return False
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    parts = next((parts for parts in (1, 2) if _rotates(inspect.unwrap(function), 8 // parts)), None)
    if parts is None:
        return False
    wrap(module, ROTATION, lambda original: _rotated(original, parts))
    return True


def _rotates(function: Any, width: int) -> bool:
    """Whether a function rotates heads of 8 values as `rotate_torch` does, by angles of so many."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, width, generator=generator) for _ in range(2))
    try:
        pairs = zip(function(q, k, cos, sin), (q, k), strict=True)
        return all(torch.allclose(one, rotate_torch(x, cos, sin)) for one, x in pairs)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False


def _rotated(original: Any, parts: int) -> Any:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        width = cos.shape[-1] * parts
        usual = q.ndim == 4 and cos.ndim == 3 and width == q.shape[-1] == k.shape[-1] and cos.shape == sin.shape
        fits = usual and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2] == k.shape[2]
        ours = not torch.compiler.is_compiling() and _in_fused_attention.get() and use_triton(q) and use_triton(k)
        if args or kwargs or not (fits and ours):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb
