"""Weights that stay in their files until it is known which part of them this rank needs.

source.py    where a tensor comes from: bytes of a safetensors file, stacked, cut, transposed, cast; read by parts
pending.py   a parameter that has only a source: shape and dtype are there, its values are read when first used
hook.py      `from_pretrained` of a mixture of experts makes its parameters pending
fill.py      prepare(): the shards of this rank are read, from the byte ranges they lie in
"""

from moe_accel.streaming.fill import by_shards, read_all_onto, read_onto, settle
from moe_accel.streaming.hook import install, shard_on_read
from moe_accel.streaming.pending import is_pending, pending_parameters

__all__ = [
    "by_shards",
    "install",
    "is_pending",
    "pending_parameters",
    "read_all_onto",
    "read_onto",
    "settle",
    "shard_on_read",
]
