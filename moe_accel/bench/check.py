"""Do two arms compute the same? Loss and gradients of one step, compared before anything is timed.

The reference is stock transformers (grouped_mm) in the same dtype, with the same weights, tokens and routing, at the
size that is timed. Each gradient is kept as its norm and up to 65,536 of its elements, evenly spread.

How much two right answers differ is measured, not guessed: the reference computes three more times with the output of
every norm and every experts module (of one block: its input, too) moved by what one rounding can do, at random. An arm
may differ from the reference four times as much as the worst of these, for each kind of parameter (all layers'
`q_proj.weight` are one kind), and always as much as `FLOORS`. Where that is more than half of a gradient, its elements
say nothing (with a router of its own, a deep model in bf16 sends near-ties elsewhere), and the record names it; its
norm is compared all the same.

Sizes: P parameters' elements kept.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.bench.routing import experts_children

KEPT = 65_536
"""Elements kept of a gradient."""
SLACK = 4.0
"""How many times the reference's own noise an arm may differ."""
NOISY_RUNS = 3
"""One near-tie of the router that falls the other way is seen in one run and not in the next, if tokens are few."""
FLOORS = {torch.bfloat16: (2e-2, 1e-2, 2e-3), torch.float32: (2e-4, 1e-4, 2e-5)}
"""By dtype, relative: elements, norm, loss; about five roundings of it, for the first, and 5000 of fp32 sums."""
SAYS_NOTHING = 0.5


@dataclass
class Fingerprint:
    """What one step computed.

    Attributes:
        loss: None of a step without one.
        tensors: by name, the norm and the kept elements [P] in fp32 on the CPU.
    """

    loss: float | None
    tensors: dict[str, tuple[float, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """Whether an arm agrees with the reference, and by how much.

    Attributes:
        problems: what disagrees, worst first; empty where nothing does.
        worst: the kind that comes nearest to its limit (or is farthest above), its difference and its limit.
        loss_difference: relative; None without a loss.
        says_nothing: kinds whose elements are too noisy to compare.
    """

    problems: tuple[str, ...]
    worst: tuple[str, float, float]
    loss_difference: float | None
    says_nothing: tuple[str, ...]


def fingerprint(loss: float | None, named: Mapping[str, Tensor | None]) -> Fingerprint:
    """Keep the norm and some elements of every tensor that is there."""
    there = {plain_name(name): tensor for name, tensor in named.items() if tensor is not None}
    return Fingerprint(loss, {name: _kept(tensor) for name, tensor in there.items()})


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and wrappers put in front."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _kept(tensor: Tensor) -> tuple[float, Tensor]:
    tensor = tensor.detach()
    stride = max(1, tensor.numel() // KEPT)
    while math.gcd(stride, tensor.shape[-1] if tensor.ndim else 1) > 1:  # or every row gives the same column
        stride += 1
    sample = tensor.reshape(-1)[::stride].float().cpu()
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).item(), sample


def compare(found: Fingerprint, reference: Fingerprint, noisy: Sequence[Fingerprint], dtype: torch.dtype) -> Verdict:
    """Hold `found` against `reference`; `noisy` are the reference computed with noise."""
    if missing := sorted(reference.tensors.keys() ^ found.tensors.keys()):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return Verdict((f"gradients of {shown} are there on one side only",), (missing[0], math.inf, 0.0), None, ())
    floors: dict[str, float] = dict(zip(("elements", "norm"), FLOORS[dtype][:2], strict=True))
    ours, own = differences(found, reference), [differences(each, reference) for each in noisy]
    ranked, nothing = [], []
    for kind, measures in ours.items():
        for measure, difference in measures.items():
            limit = max(floors[measure], SLACK * max(each[kind][measure] for each in own))
            if measure == "elements" and limit > SAYS_NOTHING:
                nothing.append(kind)
                continue
            ranked.append(
                (difference / limit if math.isfinite(difference) else math.inf, kind, measure, difference, limit)
            )
    loss_difference, problems = _loss(found, reference, noisy, FLOORS[dtype][2])
    ranked.sort(reverse=True)
    problems += [
        f"gradient of {kind}: {measure} off by {difference:.1e}, {limit:.1e} allowed"
        for excess, kind, measure, difference, limit in ranked
        if excess > 1
    ]
    _, kind, measure, difference, limit = ranked[0]
    return Verdict(tuple(problems), (f"{kind} ({measure})", difference, limit), loss_difference, tuple(nothing))


def _loss(
    found: Fingerprint, reference: Fingerprint, noisy: Sequence[Fingerprint], floor: float
) -> tuple[float | None, list[str]]:
    if reference.loss is None or found.loss is None:
        return None, []
    losses = [found.loss, *(each.loss or 0 for each in noisy)]
    difference, *own = (abs(each - reference.loss) / abs(reference.loss) for each in losses)
    limit = max(floor, SLACK * max(own))
    agrees = difference <= limit  # false for nan
    text = f"loss {found.loss:.6g} differs from {reference.loss:.6g} by {difference:.1e}, {limit:.1e} allowed"
    return difference, [] if agrees else [text]


def differences(one: Fingerprint, other: Fingerprint) -> dict[str, dict[str, float]]:
    """Relative difference of the kept elements, and of the norm, of each kind of tensor; `other` is the whole."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for name, (norm, sample) in other.tensors.items():
        other_norm, other_sample = one.tensors[name]
        if sample.shape != other_sample.shape:
            raise ValueError(f"{name} has {other_sample.numel()} elements kept here and {sample.numel()} there")
        squares = ((other_sample - sample).double().square().sum(), sample.double().square().sum())
        values = (*(square.item() for square in squares), other_norm**2, norm**2)
        kind = sums[kind_of(name)]
        for at, value in enumerate(values):
            kind[at] += value
    return {
        kind: {"elements": _ratio(off, of), "norm": abs(_ratio(mine, its) - 1) if its else float(mine > 0)}
        for kind, (off, of, mine, its) in sums.items()
    }


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.inf if part else 0.0


def kind_of(name: str) -> str:
    """A parameter's name with its layer's number taken out."""
    return re.sub(r"\.\d+\.", ".*.", name)


@contextmanager
def noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Move every norm's and every experts module's output by what one rounding can do, at random but for the seed."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    modules += [experts for _, experts in experts_children(model)]
    handles = [module.register_forward_hook(_moved(1000 * seed + number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def move(x: Tensor, seed: int) -> Tensor:
    """`x` with a relative change of up to half of its dtype's epsilon, rounded; the same for the same seed.

    The change is a constant to autograd, so that nothing more is kept for backward.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    with torch.no_grad():
        share = (
            torch.empty(x.shape, device=x.device).uniform_(-1, 1, generator=generator) * torch.finfo(x.dtype).eps / 2
        )
        change = share.mul_(x).add_(x).to(x.dtype) - x
    return x + change


def _moved(seed: int) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return move(output, seed)

    return hook
