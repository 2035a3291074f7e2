"""What a rank computes: the experts function, the forms it takes, and the modules it applies to."""

from moe_accel.experts.adapter_config import expert_lora_config, told_of_adapters
from moe_accel.experts.adapters import install as install_adapters
from moe_accel.experts.find import computing, expert_parameter_counts, find_experts, has_experts, is_decorated
from moe_accel.experts.find_beside import block_of, compute_beside
from moe_accel.experts.function import (
    NAME,
    Settings,
    count_again,
    install,
    join_adapters,
    known_sizes,
    register,
    settings_of,
)
from moe_accel.experts.gated import may_gather, why_not_gated
from moe_accel.experts.weights import hidden_size, stacked_parameters

__all__ = [
    "NAME",
    "Settings",
    "block_of",
    "compute_beside",
    "computing",
    "count_again",
    "expert_lora_config",
    "expert_parameter_counts",
    "find_experts",
    "has_experts",
    "hidden_size",
    "install",
    "install_adapters",
    "is_decorated",
    "join_adapters",
    "known_sizes",
    "may_gather",
    "register",
    "settings_of",
    "stacked_parameters",
    "told_of_adapters",
    "why_not_gated",
]
