"""moe-accel: fine-tune Hugging Face mixture-of-experts models with expert parallelism, training script unmodified.

The public names below load on first use, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

from moe_accel.version import VERSION as __version__

if TYPE_CHECKING:
    from moe_accel.experts import expert_lora_config
    from moe_accel.metrics import ExpertLoadCallback, expert_load, track_expert_load
    from moe_accel.parallelism import MoEConfig
    from moe_accel.streaming import shard_on_read

__all__ = [
    "ExpertLoadCallback",
    "MoEConfig",
    "__version__",
    "expert_load",
    "expert_lora_config",
    "shard_on_read",
    "track_expert_load",
]

_HOMES = {
    "ExpertLoadCallback": "moe_accel.metrics",
    "MoEConfig": "moe_accel.parallelism",
    "expert_load": "moe_accel.metrics",
    "expert_lora_config": "moe_accel.experts",
    "shard_on_read": "moe_accel.streaming",
    "track_expert_load": "moe_accel.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
