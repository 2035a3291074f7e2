"""Which tensors of a checkpoint are quantised, and how: names and shapes of headers, block sizes from config.json.

fp8         weight F8, [.., rows, cols]; scales one a block [.., ceil(rows/br), ceil(cols/bc)], one a row, or one
fp4         weight U8 or I8, [.., rows, cols/2], the low half of a byte first; scales [.., rows, cols/16] (nvfp4,
            F8_E4M3, with one more number for the tensor) or [.., rows, cols/32] (mxfp4, E8M0: powers of two)
mxfp4       as gpt_oss has it, _blocks U8 [E, rows, groups, 16] and _scales U8 [E, rows, groups]; transformers holds
            the matrix turned, [E, groups * 32, rows]
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_accel.convert.regions import Tensor
from moe_accel.errors import CheckpointError

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
PACKED_FP4 = frozenset({"U8", "I8", "F4"})
_FLOATS = frozenset({"F32", "BF16", "F16"})
_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_GONE_WITH_THEM = ("input_scale", "activation_scale", "weight_scale_2")
USUAL_BLOCKS = (128, 64, 32, 256, 512, 16)
"""Rows or columns that share a scale, where config.json does not say; the first that fits is taken."""
_NO_FORMULA: Mapping[str, str] = {
    "qweight": "AWQ and GPTQ pack integers with group zero points, in an order that each of their kernels defines",
    "qzeros": "AWQ and GPTQ pack integers with group zero points, in an order that each of their kernels defines",
    "weight_packed": "compressed-tensors packs numbers in ways that its own library defines",
    "weight_shape": "compressed-tensors packs numbers in ways that its own library defines",
    "weight_outer_scale_denominator": "NVFP4 with an outer scale is defined by its own library",
    "SCB": "bitsandbytes integers are defined by its own library",
}
_HINT = "load it in transformers with its own library, call model.dequantize(), save_pretrained, and convert that"


@dataclass(frozen=True, slots=True)
class Quantized:
    """One weight to dequantise. `shape`: of the result before it is turned; `block`: rows and columns of a scale."""

    name: str
    kind: str
    weight: Tensor
    scale: Tensor
    scale_2: Tensor | None
    gone: tuple[str, ...]
    shape: tuple[int, ...]
    block: tuple[int, int]
    turned: bool = False

    @property
    def result(self) -> Tensor:
        """What is written."""
        *lead, rows, cols = self.shape
        return Tensor(self.name, "BF16", (*lead, cols, rows) if self.turned else self.shape)

    @property
    def scheme(self) -> str:
        """In words."""
        rows, cols = self.block
        return f"{self.kind} {self.weight.dtype}, a {self.scale.dtype} scale for each {rows} x {cols}"


def find_quantized(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Quantized]:
    """Every quantised weight of a checkpoint.

    Raises:
        CheckpointError: there is none, or one whose formula is not known; lists all reasons.
    """
    blocks, problems, found = block_size(config), [], []
    problems += _without_formula(tensors)
    if not problems:
        for tensor in tensors.values():
            try:
                one = _mxfp4_blocks(tensor, tensors) or _with_scale(tensor, tensors, blocks)
            except CheckpointError as error:
                problems.append(error.message)
                continue
            found += [one] if one else []
    if problems:
        said = "\n".join(f"  - {one}" for one in list(dict.fromkeys(problems))[:10])
        raise CheckpointError(f"cannot be dequantised:\n{said}", _HINT)
    if not found:
        raise CheckpointError(f"nothing is quantised among {len(tensors)} tensors", "leave out --dequantize")
    return found


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`quantization_config.weight_block_size` of config.json, rows and columns; None where it says nothing."""
    for at in (config, *(each for each in config.values() if isinstance(each, dict))):
        quantization = at.get("quantization_config")
        size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
            return size[0], size[1]
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dequantised model."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _without_formula(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name in tensors:
        leaf = name.rpartition(".")[2]
        if leaf in _NO_FORMULA:
            yield f"{name}: {_NO_FORMULA[leaf]}"
        elif ".weight.quant_state." in name or ".weight.absmax" in name:
            yield f"{name}: bitsandbytes packs numbers in ways that its own library defines"


def _mxfp4_blocks(blocks: Tensor, tensors: Mapping[str, Tensor]) -> Quantized | None:
    base = blocks.name.removesuffix("_blocks")
    if base == blocks.name or blocks.dtype != "U8":
        return None
    scales = tensors.get(base + "_scales")
    shape = blocks.shape
    if scales is None or scales.dtype != "U8" or len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3]:
        raise CheckpointError(
            f"{blocks.described} must be [experts, rows, groups, 16] with U8 scales [experts, rows, groups], "
            f"has {scales.described if scales else 'none'}"
        )
    experts, rows, groups, _ = shape
    size = (experts, rows, groups * 32)
    return Quantized(base, "mxfp4", blocks, scales, None, (scales.name,), size, (1, 32), turned=True)


def _with_scale(weight: Tensor, tensors: Mapping[str, Tensor], blocks: tuple[int, int] | None) -> Quantized | None:
    """None for what is no quantised weight, scales among it."""
    names = list(_companions(weight.name, _SCALES))
    scale = next((tensors[name] for name in names if name in tensors), None)
    is_scale = any(weight.name.endswith(("_" + each, "." + each)) for each in ("scale_inv", *_SCALES))
    if weight.dtype not in FP8 | PACKED_FP4 or is_scale:
        return None
    if scale is None:
        if weight.dtype in FP8:
            raise CheckpointError(f"{weight.described} has no scale beside it, as {names[0]} would be")
        return None
    if len(weight.shape) < 2:
        raise CheckpointError(f"{weight.described} has a scale and is no matrix")
    others = [tensors[name] for name in _companions(weight.name, _GONE_WITH_THEM) if name in tensors]
    second = next((each for each in others if each.name.endswith("scale_2")), None)
    gone = (scale.name, *(each.name for each in others))
    if weight.dtype in FP8:
        if second is not None or scale.dtype not in _FLOATS | {"F8_E8M0", "U8"}:
            raise CheckpointError(f"{weight.described} with {(second or scale).described}: no formula is known for it")
        block = _fp8_block(weight, scale, blocks)
        return Quantized(weight.name, "fp8", weight, scale, None, gone, weight.shape, block)
    shape = weight.shape if weight.dtype == "F4" else (*weight.shape[:-1], weight.shape[-1] * 2)
    size = {"F8_E4M3": 16, "F8_E8M0": 32}.get(scale.dtype)
    if size is None and scale.dtype == "U8":
        size = 32
    lead = math.prod(weight.shape[:-2])
    if (
        size is None
        or scale.shape != (*shape[:-1], shape[-1] // size)
        or shape[-1] % size
        or (second is not None) != (size == 16)
        or (second is not None and (second.dtype != "F32" or math.prod(second.shape) not in (1, lead)))
    ):
        with_second = f" and {second.described}" if second else ""
        raise CheckpointError(f"{weight.described} with {scale.described}{with_second}: no formula is known for it")
    kind = "nvfp4" if size == 16 else "mxfp4"
    return Quantized(weight.name, kind, weight, scale, second, gone, shape, (1, size))


def _companions(name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    head, dot, leaf = name.rpartition(".")
    for suffix in suffixes:
        yield head + dot + suffix if leaf == "weight" else f"{name}_{suffix.removeprefix('weight_')}"


def _fp8_block(weight: Tensor, scale: Tensor, blocks: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale: what config.json says where scales form a grid, and shapes confirm."""
    *lead, rows, cols = weight.shape
    shape = scale.shape
    if math.prod(shape) == 1 or shape in (tuple(lead), (*lead, 1, 1)):
        return rows, cols
    if shape in ((*lead, rows), (*lead, rows, 1)):
        return 1, cols
    if len(shape) == len(weight.shape) and list(shape[:-2]) == lead:
        grid = shape[-2:]
        for br, bc in [blocks] if blocks else _usual_blocks(rows, cols, grid):
            if (math.ceil(rows / br), math.ceil(cols / bc)) == grid:
                return br, bc
        if rows == grid[0] and cols == 32 * grid[1] and scale.dtype in ("U8", "F8_E8M0"):
            return 1, 32
    said = f"blocks of {blocks[0]} x {blocks[1]}, as config.json says" if blocks else "blocks of a usual size"
    raise CheckpointError(f"{scale.described} does not fit {weight.described} in {said}, nor by row or as one number")


def _usual_blocks(rows: int, cols: int, grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Square blocks first; then what transformers does, rows // grid rows a block, where that is even."""
    yield from ((size, size) for size in USUAL_BLOCKS)
    if grid[0] and grid[1] and rows % grid[0] == 0 and cols % grid[1] == 0:
        yield rows // grid[0], cols // grid[1]
