"""What can go wrong, drawn first.

MoEAccelError
├── ConfigError             moe_config is wrong, or does not fit the launch, the ranks or the model (also a ValueError)
├── UnsupportedModelError   the model has no experts to swap, or somebody else distributed it (also a ValueError)
├── DependencyError         a package is missing or too old (also an ImportError)
└── CheckpointError         a checkpoint is damaged, incomplete or does not fit the model (also a ValueError)

Every message states the rule with the numbers in it; the remedy follows on a line of its own behind `hint:`.
"""

from collections.abc import Sequence


class MoEAccelError(Exception):
    """Base of every error a user can cause. `str()` gives the message, a blank line and the hint."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message, self.hint = message, hint


class ConfigError(MoEAccelError, ValueError):
    """moe_config is wrong, or does not fit the launch, the ranks or the model."""

    @classmethod
    def collect(cls, problems: Sequence[str], where: str, hint: str | None = None) -> "ConfigError":
        """One error that lists every problem, so that a config is mended in one go."""
        if len(problems) == 1:
            return cls(f"{where}: {problems[0]}", hint)
        return cls(f"{where}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems), hint)


class UnsupportedModelError(MoEAccelError, ValueError):
    """The model has no experts that can be swapped, or somebody else distributed it."""


class DependencyError(MoEAccelError, ImportError):
    """A package is missing or too old."""


class CheckpointError(MoEAccelError, ValueError):
    """A checkpoint is damaged, incomplete or does not fit the model."""
