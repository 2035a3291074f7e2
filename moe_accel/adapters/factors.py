"""LoRA factors of experts in one form, whatever the file: A [E, r, in] and B [E, out, r], as bits.

    D2 gate_up_proj   A [E*r, in], B [out, r*E]   A is expert-major, B rank-major
    D3 the same       A [E*r, out], B [in, r*E]   swapped: the file's A is B transposed, its B is A transposed

Nothing here computes: factors are unsigned integers of the element's size, and are moved, turned or filled with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_accel.adapters.family import split_path
from moe_accel.errors import CheckpointError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Factors:
    """A and B of one projection of all experts; of gate and up together where they share A.

    Attributes:
        roles: ("gate",), ("up",), ("down",) or ("gate", "up").
        in_features: columns of A.
        out_features: rows of B, of all roles together.
        scaling: what B @ A is multiplied by.
        dtype: safetensors' name of it.
        tensors: the tensors of the file that hold it.
        load: A [E, r, in] and B [E, out, r].
        order: how gate and up share B's rows; None: as the model's parameter does.
    """

    roles: tuple[str, ...]
    num_experts: int
    rank: int
    in_features: int
    out_features: int
    alpha: float
    scaling: float
    dtype: str
    tensors: tuple[str, ...]
    load: Callable[[], tuple[Array, Array]]
    order: str | None = None


@dataclass(frozen=True)
class Experts:
    """The adapted experts of one layer. `dialect` is the key of `dialect.DIALECTS`."""

    path: str
    dialect: str
    num_experts: int
    factors: tuple[Factors, ...]

    @property
    def layer(self) -> str:
        """Everything up to the number of the layer."""
        return split_path(self.path)[0]

    @property
    def block(self) -> str:
        """The MoE module below the layer."""
        return split_path(self.path)[1]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that are adapted."""
        return tuple(role for each in self.factors for role in each.roles)


def rows_of(b: Array, roles: tuple[str, ...], role: str, order: str) -> Array:
    """The rows of `role` in B [..., out, r] of `roles`, a view."""
    if len(roles) == 1:
        return b
    half = b.shape[-2] // 2
    if order == "interleaved":
        return b[..., roles.index(role) :: 2, :]
    first = (role == roles[0]) == (order == "gate-up")
    return b[..., :half, :] if first else b[..., half:, :]


def check_shapes(path: str, factors: tuple[Factors, ...]) -> None:
    """Gate, up and down of a layer must belong together.

    Raises:
        CheckpointError: they do not.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for each in factors:
        if each.out_features % len(each.roles):
            raise CheckpointError(f"{path}: {each.tensors[-1]} has {each.out_features} rows for gate and up together")
        for role in each.roles:
            if role in sizes:
                raise CheckpointError(f"{path} has {role} twice: {each.tensors[0]}")
            sizes[role] = (each.out_features // len(each.roles), each.in_features)
    said = ", ".join(f"{role} {out} x {width}" for role, (out, width) in sizes.items())
    if {"gate", "up"} <= sizes.keys() and sizes["gate"] != sizes["up"]:
        raise CheckpointError(f"{path}: gate and up differ in shape: {said}")
    up = sizes.get("up", sizes.get("gate"))
    if up and "down" in sizes and up != sizes["down"][::-1]:
        raise CheckpointError(f"{path}: these do not belong to the same experts: {said} (outputs x inputs)")


def unpack(a: Array, b: Array, num_experts: int, grouped: bool, swapped: bool) -> tuple[Array, Array]:
    """A [E, r, in] and B [E, out, r] of two stacked matrices, [E*r, x] and [y, E*r]; views."""
    a = a.reshape(num_experts, -1, a.shape[-1])
    if grouped:
        b = b.reshape(b.shape[0], num_experts, -1).transpose(1, 0, 2)
    else:
        b = b.reshape(b.shape[0], -1, num_experts).transpose(2, 0, 1)
    return (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if swapped else (a, b)


def pack(a: Array, b: Array, swapped: bool) -> tuple[Array, Array]:
    """The two matrices that PEFT (>= 0.19.1) keeps for A [E, r, in] and B [E, out, r]: [E*r, x] and [y, r*E]."""
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    rows, out = a.shape[0] * a.shape[1], b.shape[1]
    return a.reshape(rows, a.shape[2]), b.transpose(1, 2, 0).reshape(out, rows)
