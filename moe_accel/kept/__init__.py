"""Layers that gradient checkpointing leaves out: a number (`layers.py`), or what memory has room for (`auto.py`)."""

from moe_accel.kept.auto import keep
from moe_accel.kept.layers import install, keep_layers, kept_experts, knows_layers, unwrap_kept

__all__ = ["install", "keep", "keep_layers", "kept_experts", "knows_layers", "unwrap_kept"]
