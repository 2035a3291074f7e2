"""The parts of `te_parts`: what TransformerEngine computes under `kernels: te`, and whether it can here."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moe_accel.errors import ConfigError, DependencyError
from moe_accel.kernels import te, te_attention, te_fp8, te_norm, te_router, te_rows


class Part(NamedTuple):
    """One of `te_parts`.

    Attributes:
        told: what it is.
        lookup: why the package cannot compute it, found without a GPU; None where it can.
        tried: why it is not computed rightly on a device; None where it is.
        least: compute capability that it needs.
        feature: what of a GPU that is.
    """

    told: str
    lookup: Callable[[], str | None]
    tried: Callable[[torch.device], str | None]
    least: tuple[int, int] = (8, 0)
    feature: str = "bf16"


PARTS = {
    "experts": Part("grouped GEMMs of the experts", te.lookup, te.tried),
    "permutation": Part("permutation of tokens", te_rows.lookup, te_rows.tried),
    "router": Part("router", te_router.lookup, te_router.tried),
    "norms": Part("RMSNorm", te_norm.lookup, te_norm.tried),
    "attention": Part("attention", te_attention.lookup, te_attention.tried),
    "fp8": Part("large linear layers in FP8", te_fp8.lookup, te_fp8.tried, te_fp8.CAPABILITY, "FP8"),
}
OF_EXPERTS = ("experts", "permutation")
"""Those that are inside of the experts function."""


def problem(device: torch.device, name: str) -> str | None:
    """Why a part cannot be used on this device, found without allocating anything there; None where it can."""
    part = PARTS[name]
    return te.wrong_device(device, part.least, part.feature) or te.lacks(part.lookup)


def check(device: torch.device, names: Sequence[str]) -> None:
    """Refuse `kernels: te` where TransformerEngine cannot compute these parts on this device; each is tried.

    Raises:
        ConfigError: without a GPU, or on one without bf16 or FP8.
        DependencyError: the package is missing, cannot be imported, is another version's, or fails.
    """
    for name in names:
        part = PARTS[name]
        asked = asked_for(name, names)
        others = [each for each in names if each != name and problem(device, each) is None]
        instead = f"te_parts: [{', '.join(others)}]" if others else "kernels: auto"
        found = te.wrong_device(device, part.least, part.feature)
        if found is not None:
            raise ConfigError(f"{asked} cannot be used: {found}", instead)
        found = te.lacks(part.lookup) or _outcome(part.tried, device)
        if found is not None:
            fix = f"{instead}, or {te.INSTALL}" if not te.is_installed() else f"{instead}; moe-accel doctor says more"
            raise DependencyError(f"{asked} cannot be used: {found}", fix)


@functools.cache
def _outcome(tried: Callable[[torch.device], str | None], device: torch.device) -> str | None:
    """What a trial says, of which there is one for the Accelerator and each of its models."""
    return tried(device)


def asked_for(name: str, names: Sequence[str]) -> str:
    """The setting by which a part was asked for, alone or with others."""
    return "kernels=te" if list(names) == ["experts"] else f"kernels=te with {name} in te_parts"


def told(names: Sequence[str]) -> str:
    """What is computed by these parts, in words."""
    found = [PARTS[name].told for name in PARTS if name in names]
    return " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
