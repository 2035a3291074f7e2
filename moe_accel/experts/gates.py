"""Which gate an experts module has, found by trying: never by the name of a class.

The module's own `_apply_gate` is asked for some values in fp64, and so is every gate of `kernels/glu.py` that the
numbers on the module allow (a limit of its clamps, a slope of its sigmoid). The one with the same values is it.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.kernels.glu import GELU_TANH, SWIGLU, Gate, glu_torch

QUICK_GELU = 1.702
"""The slope with which x * sigmoid(slope * x) is near GELU; OpenAI's choice."""


def find_gate(module: Any) -> Gate | None:
    """The gate of an experts module that has one; None if it is none of `kernels/glu.py`.

    Sought once for a module, and again where another gate or activation is put on it.
    """
    apply_gate, act_fn = getattr(module._apply_gate, "__func__", module._apply_gate), getattr(module, "act_fn", None)
    known = module.__dict__.get("_moe_accel_gate")
    if known is None or known[0] is not apply_gate or known[1] is not act_fn:
        known = apply_gate, act_fn, _find(module, (apply_gate, _fingerprint(act_fn), *_numbers(module)))
        module._moe_accel_gate = known
    return known[2]


_found: dict[Any, Gate | None] = {}
"""Of every kind of module seen: there are many modules of a kind."""


def _find(module: Any, kind: Any) -> Gate | None:
    if kind not in _found:
        _found[kind] = _try(module._apply_gate, _numbers(module))
    return _found[kind]


def _fingerprint(act_fn: Any) -> Any:
    """What tells activations apart: the function, or the class and what it was made with."""
    if not isinstance(act_fn, nn.Module):
        return act_fn
    plain = {name: value for name, value in vars(act_fn).items() if isinstance(value, int | float | str)}
    return type(act_fn), tuple(sorted(plain.items()))


def _numbers(module: Any) -> tuple[float, ...]:
    """The positive numbers set on a module, among which those of its gate are."""
    found = {float(each) for each in vars(module).values() if isinstance(each, int | float) and each > 0}
    return tuple(sorted(found))


def _try(apply_gate: Callable[[Tensor], Tensor], numbers: tuple[float, ...]) -> Gate | None:
    """The gate with the values of `apply_gate`, near 0 and on both sides of every number."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 + len(numbers), 256, generator=generator, dtype=torch.float64)
    u = (noise * torch.tensor([1.0, *numbers], dtype=torch.float64)[:, None] * 2).view(-1, 8)
    try:
        expected = apply_gate(u)
    except Exception:  # it wants other shapes, dtypes or a device: whatever it is, it is none of these
        return None
    for gate in _candidates(numbers):
        found = glu_torch(u, u.new_ones(len(u)), gate=gate)
        if found.shape == expected.shape and torch.allclose(found, expected.to(found.dtype), rtol=1e-6, atol=1e-6):
            return gate
    return None


def _candidates(numbers: tuple[float, ...]) -> Iterator[Gate]:
    slopes = [
        (SWIGLU.slope, 0.0),
        (GELU_TANH.slope, GELU_TANH.cubic),
        (QUICK_GELU, 0.0),
        *((each, 0.0) for each in numbers),
    ]
    for (slope, cubic), limit, shift, interleaved in product(slopes, (None, *numbers), (0.0, 1.0), (False, True)):
        yield Gate(slope, cubic, limit, shift, interleaved)
