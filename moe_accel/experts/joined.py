"""A projection's weights and its adapter side by side in memory, so that one grouped GEMM multiplies by both.

    [ W  A ]   rows @ A is the adapter's inner part, low;      [rows, low] @ [W ; B] is rows @ W + low @ B
    [ B  . ]   and backward is the same of the transposed:     [g, g @ B.T] @ [W.T ; A.T]

The two are added in the GEMM's own fp32 sums: nothing of [P,out] is written twice, and no adapter is rounded away
beside what it is added to. W stays the model's parameter, a view of the whole; A and B, a few MB, are written there
from PEFT's parameters in each forward and nowhere else: backward and recompute find them, or write them again where
another forward has written its own since. Only frozen weights that lie on this rank as they are used are joined: all of
them on one GPU, this rank's experts where nobody shares them. FSDP gathers parameters into memory of its own.
Before a state dict is made the weights leave it, as safetensors wants whole memory, and the next training forward joins
them again.

Sizes: e experts, A inner, B outer, r rank (padded), P rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe_accel.backward import in_backward
from moe_accel.kernels.grouped import GroupedGemm, takes_torch_grouped_mm


class Joined:
    """The memory of one parameter [e,A,B] and an adapter of rank r.

    Attributes:
        whole: [e,A+r,B+r], of any strides.
        shape: A, B.
        rank: r.
        is_recorded: whether a CUDA graph writes here, too, whenever it is played: nobody knows what is here then.
    """

    def __init__(self, matrix: Tensor, rank: int):
        """Copy matrix [e,A,B], of any strides, into memory with room for the adapter."""
        count, inner, outer = matrix.shape
        self.shape, self.rank = (inner, outer), rank
        if matrix.stride(1) == 1:
            self.whole = matrix.new_empty(count, outer + rank, inner + rank).transpose(1, 2)
        else:
            self.whole = matrix.new_empty(count, inner + rank, outer + rank)
        self.matrix.copy_(matrix)
        self._where = _where(self.matrix)
        self._held: Any = None
        self.is_recorded = False

    @property
    def matrix(self) -> Tensor:
        """[e,A,B], a view."""
        return self.whole[:, : self.shape[0], : self.shape[1]]

    @property
    def a(self) -> Tensor:
        """[e,A,r], the memory beside, and nothing that autograd knows."""
        return self.whole[:, : self.shape[0], self.shape[1] :].data

    @property
    def b(self) -> Tensor:
        """[e,r,B], likewise."""
        return self.whole[:, self.shape[0] :, : self.shape[1]].data

    def leave(self, module: Any, name: str) -> bool:
        """Give the parameter memory of its own again; False where it has that already."""
        if not self.is_of(module, name):
            return False
        parameter: nn.Parameter = getattr(module, name)
        _move(parameter, _memory(parameter).contiguous())
        return True

    def is_of(self, module: Any, name: str) -> bool:
        """Whether a parameter still lies here: nobody moved or replaced it."""
        return _where(_turned(module, _memory(getattr(module, name)))) == self._where

    def has_room(self, rank: int, dtype: torch.dtype) -> bool:
        """Whether an adapter of this padded rank and dtype has its place here."""
        return rank == self.rank and dtype == self.whole.dtype

    def hold(self, source: Any) -> None:
        """Have the A and B of a `Source` beside the weights."""
        if self._held is not source or self.is_recorded:
            known = in_backward() and self._held is not None and self._held.is_same(source)
            if not known or self.is_recorded:
                self._held = None
                source.write(self.a, self.b)
            self._held = source


def _is_gathered(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether FSDP2 gathers a parameter, with its experts module or with the layer around: all but what `ep` alone
    spreads."""
    if not isinstance(parameter, DTensor):
        return False
    return isinstance(module, FSDPModule) or "ep" not in (parameter.device_mesh.mesh_dim_names or ())


def _memory(parameter: Any) -> Tensor:
    """What this rank has of a parameter, itself, without autograd."""
    return parameter._local_tensor.detach() if isinstance(parameter, DTensor) else parameter.detach()


def _move(parameter: Any, memory: Tensor) -> None:
    """Let a parameter be in other memory, as FSDP2 does it to a DTensor."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = memory
    else:
        parameter.data = memory


def _turned(module: Any, tensor: Tensor) -> Tensor:
    """From a parameter's own orientation to [e,A,B], or back: a view."""
    return tensor if module.is_transposed else tensor.transpose(1, 2)


def _where(matrix: Tensor) -> tuple[Any, ...]:
    return matrix.data_ptr(), matrix.stride(), matrix.dtype


class Projection(NamedTuple):
    """What rows are multiplied by.

    Attributes:
        gemm: who multiplies.
        matrix: [e,A,B].
        a: [e,A,r] of an adapter, or None.
        b: [e,r,B], or None.
        whole: [e,A+r,B+r] where the three lie side by side; None where they do not.
    """

    gemm: GroupedGemm
    matrix: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    whole: Tensor | None = None

    def transposed(self) -> "Projection":
        """What gradients of the product are multiplied by: views."""
        flipped = [None if each is None else each.transpose(1, 2) for each in (self.matrix, self.b, self.a, self.whole)]
        return Projection(self.gemm, *flipped)  # pyright: ignore[reportArgumentType]

    @property
    def tail(self) -> int:
        """Columns that rows need behind their own, for `low`."""
        return 0 if self.whole is None else self.whole.shape[1] - self.matrix.shape[1]

    def low(self, rows: Tensor, ends: Tensor) -> Tensor | None:
        """rows @ A [P,r], also written behind the rows where they have a tail; None without an adapter.

        Args:
            rows: [P,A+tail].
            ends: as for `grouped_mm`.
        """
        if self.a is None:
            return None
        width = self.matrix.shape[1]
        low = self.gemm.multiply(rows[:, :width], self.a, ends)
        if self.whole is not None:
            rows[:, width:] = low
        return low

    def product(self, rows: Tensor, low: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows @ matrix [P,B], and what the adapter adds to it [P,B]: None without one, or where it is in the first."""
        if self.whole is not None:
            return self.gemm.multiply(rows, self.whole[:, :, : self.matrix.shape[2]], ends), None
        more = None if low is None or self.b is None else self.gemm.multiply(low, self.b, ends)
        return self.gemm.multiply(rows, self.matrix, ends), more


def join(module: Any, name: str, rank: int) -> Joined | None:
    """Move a parameter of an experts module into memory with room for an adapter; None where that gains nothing.

    Args:
        module: an experts module of transformers.
        name: of a parameter, [E,in,out] if the module is transposed, else [E,out,in].
        rank: of the adapter, padded.
    """
    parameter: nn.Parameter = getattr(module, name)
    memory = _memory(parameter)
    if _is_gathered(module, parameter) or parameter.requires_grad or not memory.is_contiguous():
        return None
    matrix = _turned(module, memory)
    rows = torch.empty(0, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    if not takes_torch_grouped_mm(rows, matrix):
        return None
    joined = Joined(matrix, rank)
    _move(parameter, _turned(module, joined.matrix))
    return joined
