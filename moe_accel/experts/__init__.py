"""What a rank computes: the experts function, the forms it takes, and the modules it applies to."""

from moe_accel.experts.find import expert_parameter_counts, find_experts, is_decorated
from moe_accel.experts.function import NAME, Settings, install, register, settings_of
from moe_accel.experts.weights import stacked_parameters

__all__ = [
    "NAME",
    "Settings",
    "expert_parameter_counts",
    "find_experts",
    "install",
    "is_decorated",
    "register",
    "settings_of",
    "stacked_parameters",
]
