"""The words that planning and copying share: a plan is a list of strided copies between named tensors.

Every matrix of an expert is (rows = output features, columns = input features), whatever the file calls it. A stored
form is a strided `Region` of one tensor, counted in elements:

    per-expert [I, H]                         offset 0                rows I  cols H  row_stride H    col_stride 1
    gate of expert e in stacked [E, 2I, H]    offset e*2*I*H          rows I  cols H  row_stride H    col_stride 1
    up of expert e, interleaved [E, 2I, H]    offset e*2*I*H + H      rows I  cols H  row_stride 2*H  col_stride 1
    gate of expert e, transposed [E, H, 2I]   offset e*2*I*H          rows I  cols H  row_stride 1    col_stride 2*I

A vector (a bias, one scale per row) has one column; a scalar has one row and one column.

What comes once a tensor or more is a NamedTuple: a checkpoint may hold a hundred thousand, and a frozen dataclass takes
three times as long to make.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Tensor(NamedTuple):
    """A tensor as its safetensors header describes it. `dtype` is safetensors' own name: BF16, F8_E4M3, I32, ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def described(self) -> str:
        """For messages: name, dtype and shape."""
        return f"{self.name} {self.dtype} {list(self.shape)}"


class Region(NamedTuple):
    """A two-dimensional strided part of one tensor, in elements.

    (r, c) lies at `offset + r * row_stride + c * col_stride`.
    """

    tensor: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int


class Copy(NamedTuple):
    """Element (r, c) of `source` goes to element (r, c) of `target`; both have the same rows and columns."""

    source: Region
    target: Region


class Output(NamedTuple):
    """One tensor to write. Its copies cover every element exactly once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[Copy, ...]


BESIDE = -1
"""Number of the expert in a `Part` that is no expert's: a tensor that is renamed with them."""


class Part(NamedTuple):
    """One matrix of one expert, named independently of any layout: what `verify` digests.

    `layer` is the canonical prefix of the layer's experts; `role` is `gate`, `up` or `down`, with a suffix for what
    travels with the matrix: `gate.bias`, `down.weight_scale_inv`.
    """

    layer: str
    expert: int
    role: str
    region: Region


class Layout(NamedTuple):
    """What the planner found under one prefix and what it makes of it. `source == target`: left as it is."""

    prefix: str
    source: str
    target: str
    num_experts: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion: what to write, and what to tell the user about it."""

    outputs: tuple[Output, ...]
    layouts: tuple[Layout, ...]
    passed_through: tuple[str, ...]
    notes: tuple[str, ...]


def whole(tensor: Tensor) -> Region:
    """All of a tensor as one contiguous row."""
    numel = math.prod(tensor.shape)
    return Region(tensor.name, 0, 1, numel, numel, 1)


def whole_output(tensor: Tensor, name: str) -> Output:
    """A tensor as it is, under a name."""
    region = whole(tensor)
    target = Region(name, 0, 1, region.cols, region.cols, 1)
    return Output(name, tensor.dtype, tensor.shape, (Copy(region, target),) if region.cols else ())
