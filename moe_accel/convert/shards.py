"""Which output tensor goes into which file: natural layer order, a new file when the next tensor would not fit."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_accel.convert.headers import make_header, num_bytes
from moe_accel.convert.regions import Output, Tensor
from moe_accel.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DIGITS = re.compile(r"([0-9]+)")
_UNITS = {"": 1, "B": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its header, then its tensors at `starts`."""

    name: str
    outputs: tuple[Output, ...]
    header: bytes
    starts: dict[str, int]
    file_bytes: int


def parse_size(text: str) -> int:
    """Bytes of "5GB" (1000s), "4GiB" (1024s) or "800000".

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = {name.lower(): size for name, size in _UNITS.items()}.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"max_shard_size={text!r} is not a size", "write it like 5GB, 800MB or 4GiB")
    if not match[2] and float(match[1]) < 1000:
        raise ConfigError(f"max_shard_size={text!r} would be {text} bytes", f"write the unit, as in {match[1]}GB")
    return int(float(match[1]) * unit)


def natural(name: str) -> list[Any]:
    """A sort key by which layers.2 stands before layers.10: text and numbers in turn, text first."""
    parts: list[Any] = _DIGITS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts


def pack(outputs: Iterable[Output], max_shard_bytes: int, metadata: Mapping[str, str] | None) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_bytes` of data; a larger tensor gets a file of its own."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in sorted(outputs, key=lambda each: natural(each.name)):
        added = num_bytes(output.dtype, output.shape)
        if groups[-1] and size + added > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += added
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{at:05d}-of-{len(groups):05d}.safetensors" for at in range(1, len(groups) + 1)]
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, group: list[Output], metadata: Mapping[str, str] | None) -> Shard:
    tensors = {output.name: Tensor(output.name, output.dtype, output.shape) for output in group}
    header, starts = make_header(tensors, metadata)
    by_name = {output.name: output for output in group}
    outputs = tuple(by_name[each] for each in starts)
    file_bytes = len(header) + sum(num_bytes(output.dtype, output.shape) for output in group)
    return Shard(name, outputs, header, starts, file_bytes)


def make_index(shards: Iterable[Shard], metadata: Mapping[str, Any] | None) -> bytes:
    """The index of several files, in transformers' form; `metadata` of the source is kept, total_size made anew."""
    shards = list(shards)
    total = sum(shard.file_bytes - len(shard.header) for shard in shards)
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    index = {"metadata": {**(metadata or {}), "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
