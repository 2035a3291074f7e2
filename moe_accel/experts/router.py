"""A router whose rule is one of `kernels/router.py` computes what follows its linear layer by those kernels.

The logits that come out are the output of its linear layer, as before: what reads them (aux loss,
`output_router_logits`) sees the same tensor and the same graph. Which rule it is, and for which dtypes, is proven by
`router_proof.py`; for all others the router goes on with its own function.

Sizes: N tokens, H hidden, E experts, K top-k.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.kernels.device import autocast_dtype, use_triton
from moe_accel.kernels.router import Rule, route
from moe_accel.swap import become

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None, int]
"""Of tokens, of weights, in which autocast multiplies; and dimensions of the tokens."""


@dataclass(frozen=True)
class Logits:
    """How a router makes logits of tokens.

    Attributes:
        child: name of its linear layer; None where weight, and maybe bias, are its own.
        bias: whether that has a bias.
        cast: dtype in which tokens and weights are multiplied: their own (`""`), fp32, or the weight's.
        then: whether the product becomes fp32 afterwards.
    """

    child: str | None = None
    bias: bool = False
    cast: str = ""
    then: bool = False

    def weight(self, module: Any) -> Tensor:
        """[E,H]."""
        return (module if self.child is None else getattr(module, self.child)).weight

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """x [...,H] -> [N,E]."""
        weight = self.weight(module)
        x = x.reshape(-1, weight.shape[1])
        if self.cast:
            x = x.to(torch.float32 if self.cast == "fp32" else weight.dtype)
        if self.child is not None:
            logits = getattr(module, self.child)(x)
        else:
            bias = module.bias if self.bias else None
            if self.cast == "fp32":
                weight, bias = weight.to(torch.float32), None if bias is None else bias.to(torch.float32)
            logits = nn.functional.linear(x, weight, bias)
        return logits.to(torch.float32) if self.then else logits


@dataclass(frozen=True)
class Proof:
    """What a router computes.

    Attributes:
        logits: how it makes its logits.
        rule: how it chooses.
        correction: name of what is added to the scores where experts are chosen; `""`: its second argument.
        order: places of logits, weights and experts in what it returns.
        dtypes: of the weights, for all dtypes where it computes nothing else.
        numbers: what is set on the module, for which this holds.
    """

    logits: Logits
    rule: Rule
    correction: str | None
    order: tuple[int, int, int]
    dtypes: dict[Dtypes, torch.dtype]
    numbers: tuple[tuple[str, Any], ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing was set on the module since."""
        state = vars(module)
        return all(state.get(name) == value for name, value in self.numbers)

    def computes(self, autocast: torch.dtype | None) -> bool:
        """Whether it holds for any tokens under this autocast."""
        return any(key[2] == autocast for key in self.dtypes)

    def bias(self, module: Any, given: tuple[Any, ...]) -> Tensor | None:
        """[E] what is added to scores where experts are chosen; `given` are the arguments behind the tokens."""
        if self.correction is None:
            return None
        return getattr(module, self.correction) if self.correction else given[0]

    def outputs(
        self, module: Any, x: Tensor, given: tuple[Any, ...], dtype: torch.dtype, function: Any = None
    ) -> tuple[Tensor, ...]:
        """What the router returns for tokens x [...,H], with weights in `dtype`; `function`: of `install`."""
        logits = self.logits(module, x)
        found = logits, *(function or route)(logits, self.bias(module, given), self.rule, dtype)
        placed = dict(zip(self.order, found, strict=True))
        return placed[0], placed[1], placed[2]


def install(module: Any, proof: Proof, function: Any = None) -> None:
    """Let a router compute what was proven of it with `route`, or another `function` of its contract."""
    module._moe_accel_router, module._moe_accel_route = proof, function
    become(module, _FusedRouter)


def proof_of(module: nn.Module) -> Proof | None:
    """What was proven of a router that computes with the kernels; None of any other module."""
    return getattr(module, "_moe_accel_router", None)


class _FusedRouter(nn.Module):
    """What a router does instead."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """By the kernels, where that was proven of these tensors and they are on a GPU; else the router's own."""
        if torch.compiler.is_compiling():  # the compiler fuses by itself
            return super().forward(*args, **kwargs)
        if kwargs:
            args = inspect.signature(super().forward).bind(*args, **kwargs).args
        proof: Proof = self._moe_accel_router
        x, *given = args
        weight = proof.logits.weight(self)
        dtype = proof.dtypes.get((x.dtype, weight.dtype, autocast_dtype(x.device), x.ndim))
        plain = all(type(each) in (Tensor, nn.Parameter) for each in (x, weight, *given))
        if dtype is None or not (plain and use_triton(x) and proof.holds(self)):
            return super().forward(*args)
        return proof.outputs(self, x, tuple(given), dtype, self._moe_accel_route)
