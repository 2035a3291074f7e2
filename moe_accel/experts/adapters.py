"""PEFT LoRA on the experts, without ever building a weight with its adapter in it.

PEFT targets an expert parameter by a `ParamWrapper` around the experts module, one per parameter. Its forward adds
`s * B @ A` to the parameter of every expert, calls the module, and takes it off again: a copy of all experts, and the
gradient of all of it, however few tokens there are (1.2 GB a layer of Qwen3-30B-A3B each, bf16). Here that one method
is replaced by a note on the experts module, and the experts function multiplies rows by A, then by B. What is active,
disabled or merged stays PEFT's business, and so do the parameters, their names and their files.

PEFT's shapes, of E experts: `lora_A.weight` [E * r, in], expert by expert; `lora_B.weight` [out, r * E], expert last.

Sizes: E experts, e experts of this rank, r rank (of all active adapters together).
"""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_accel.errors import UnsupportedModelError
from moe_accel.experts.joined import Joined
from moe_accel.experts.weights import projections
from moe_accel.kernels.device import autocast_dtype
from moe_accel.swap import become


class Factors(NamedTuple):
    """Rows of an expert times its A times its B is what its adapters add. Scaling is in B.

    Attributes:
        a: [e,in,r].
        b: [e,r,out].
        joined: memory of the weights that the two lie in; None where they have memory of their own.
        source: what they are written there from, once more in backward where another forward took the place.
    """

    a: Tensor
    b: Tensor
    joined: Joined | None = None
    source: "Source | None" = None


class Source:
    """PEFT's parameters of the active adapters, as they are now, and how factors are made of them.

    Args:
        given: A and B of each adapter by turns, in PEFT's shapes.
        scalings: of each.
        num_experts: E.
        local: the experts of this rank.
    """

    def __init__(self, given: list[Tensor], scalings: list[float], num_experts: int, local: slice):
        self.given, self.scalings, self.num_experts, self.local = given, scalings, num_experts, local
        self.versions = [each._version for each in given]
        self.ranks = [each.shape[0] // num_experts for each in given[::2]]
        self.padded = sum(self.ranks) + -sum(self.ranks) % ALIGNED

    def parts(self) -> Iterator[tuple[Tensor, Tensor, float, slice]]:
        """A, B, scaling and place among the ranks of each adapter."""
        start = 0
        for a, b, rank, scaling in zip(self.given[::2], self.given[1::2], self.ranks, self.scalings, strict=True):
            yield a, b, scaling, slice(start, start + rank)
            start += rank

    def write(self, a: Tensor, b: Tensor) -> None:
        """Write the factors into a [e,in,r] and b [e,r,out].

        Raises:
            RuntimeError: the parameters were changed in place since this was made: backward would be of other ones.
        """
        if self.versions != [each._version for each in self.given]:
            raise RuntimeError("an adapter was changed in place between a forward pass and its backward pass")
        if self.padded > sum(self.ranks):
            a[:, :, sum(self.ranks) :].zero_()
            b[:, sum(self.ranks) :].zero_()
        for a_given, b_given, scaling, part in self.parts():
            rank = part.stop - part.start
            a[:, :, part].copy_(a_given.view(self.num_experts, rank, -1)[self.local].transpose(1, 2))
            of_experts = b_given.view(-1, rank, self.num_experts)[..., self.local].permute(2, 1, 0)
            torch.mul(of_experts, scaling, out=b[:, part])

    def is_same(self, other: "Source") -> bool:
        """Whether the other would write the same."""
        mine = self.versions, self.scalings, self.num_experts, self.local
        of_other = other.versions, other.scalings, other.num_experts, other.local
        same_tensors = len(self.given) == len(other.given) and all(map(operator.is_, self.given, other.given))
        return same_tensors and mine == of_other


ALIGNED = 8
"""Ranks are padded to a multiple: grouped GEMMs of bf16 want rows of 16 bytes."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapted:
    """The adapters on one experts module.

    Attributes:
        name: of the module.
        num_experts: routed experts that they adapt.
        ranks: parameter name -> adapter name -> rank.
        trainable: whether any of their parameters requires a gradient.
    """

    name: str
    num_experts: int
    ranks: dict[str, dict[str, int]]
    trainable: bool


def install(model: nn.Module, experts: list[tuple[str, Any]]) -> list[Adapted]:
    """Let the adapters on `experts` be computed by the experts function.

    Raises:
        UnsupportedModelError: an adapter is of a kind that the experts function does not compute, or was asked for on
            experts that have none.
    """
    names = {id(module): name for name, module in experts}
    found: dict[str, Adapted] = {}
    wrappers: list[Any] = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    for each in wrappers:
        base = each.get_base_layer()
        if id(base) not in names:
            continue
        _refuse(names[id(base)], base, each)
        become(each, _Noting)
        trains = any(parameter.requires_grad for part in (each.lora_A, each.lora_B) for parameter in part.parameters())
        before = found.get(names[id(base)])
        ranks = {**(before.ranks if before else {}), each.parameter_name: dict(each.r)}
        trains = trains or (before is not None and before.trainable)
        found[names[id(base)]] = Adapted(names[id(base)], base.num_experts, ranks, trains)
    return list(found.values())


def _refuse(name: str, base: Any, wrapper: Any) -> None:
    parameter = wrapper.parameter_name
    known = projections(base)
    if parameter not in known:
        raise UnsupportedModelError(
            f"{name}: an adapter sits on {parameter}, which is no projection of {type(base).__name__}",
            f"target_parameters may name {' and '.join(known)}",
        )
    dtype = getattr(base, parameter).dtype
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{name}: an adapter sits on {parameter}, whose weights are {dtype}",
            "adapters train on weights in bf16, fp16 and fp32: `moe-accel convert --dequantize bf16` makes such",
        )


class _Noting(nn.Module):
    """What a `ParamWrapper` of PEFT does instead."""

    @contextmanager
    def _activate_lora(self: Any, active: list[str]) -> Iterator[None]:
        """Note what is active while the module runs."""
        notes = self.get_base_layer().__dict__.setdefault("_moe_accel_adapters", {})
        before = notes.get(self.parameter_name)
        notes[self.parameter_name] = (self, [name for name in active if name in self.lora_A])
        try:
            yield
        finally:
            notes[self.parameter_name] = before


def factors(
    module: Any,
    parameter: str,
    ep_rank: int,
    ep_size: int,
    joined: Mapping[str, Joined] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
) -> Factors | None:
    """The factors that are active on a parameter now, for the experts of this rank.

    Every rank of an `ep` group has all factors, as FSDP2 shards them with everything else; the gradients of those of
    this rank's experts are scaled as in `scale.py`, the other way: they are averaged over all ranks.

    Returns:
        [e,in,r] and [e,r,out] in `dtype`, or what autocast says, or that of the weights; None where no adapter is
        active. Within `joined` where the weights are there and have room: to be read before another forward of the
        module.
    """
    note = module.__dict__.get("_moe_accel_adapters", {}).get(parameter)
    if note is None or not note[1]:
        return None
    wrapper, names = note
    weight = getattr(module, parameter)
    of_factors: torch.dtype = dtype or autocast_dtype(weight.device) or weight.dtype
    given = []
    for name in names:
        given += [wrapper.lora_A[name].weight, wrapper.lora_B[name].weight]
    count = module.num_experts // ep_size
    local = slice(ep_rank * count, (ep_rank + 1) * count)
    source = Source(given, [wrapper.scaling[name] for name in names], module.num_experts, local)
    place = joined.get(parameter)
    if place is not None and not place.has_room(source.padded, of_factors):
        place = None
    a, b = _Factors.apply(of_factors, ep_size, source, place, *given)  # pyright: ignore[reportGeneralTypeIssues]
    return Factors(a, b, place, source)


def active_ranks(model: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """The experts modules and parameters that have active adapters now, and their rank together, padded."""
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, _Noting)]
    for each in wrappers:
        rank = sum(each.r[name] for name in each.active_adapters if name in each.lora_A)
        if rank:
            yield each.get_base_layer(), each.parameter_name, rank + -rank % ALIGNED


class _Factors(torch.autograd.Function):
    """From PEFT's parameters to factors: one note for autograd, where views and copies would be ten."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, ep_size: int, source: Source, place: Joined | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.ep_size, ctx.source = ep_size, source
        if place is not None:
            place.hold(source)
            return place.a, place.b
        count = source.local.stop - source.local.start
        a_eri = given[0].new_empty(count, source.padded, given[0].shape[1], dtype=dtype)
        b_ero = given[1].new_empty(count, source.padded, given[1].shape[0], dtype=dtype)
        source.write(a_eri.transpose(1, 2), b_ero)
        return a_eri.transpose(1, 2), b_ero

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a_grad, b_grad, source = gradients[0].transpose(1, 2), gradients[1], ctx.source
        found: list[Tensor | None] = [None] * 4
        new = torch.empty_like if ctx.ep_size == 1 else torch.zeros_like  # of the other ranks' experts: nothing
        for a_given, b_given, scaling, part in source.parts():
            rank = part.stop - part.start
            if ctx.ep_size == 1 and rank == source.padded:
                a = a_grad.reshape(a_given.shape).to(a_given.dtype)
            else:
                a = new(a_given, memory_format=torch.contiguous_format)
                of_experts = a.view(source.num_experts, rank, -1)[source.local]
                torch.mul(a_grad[:, part], float(ctx.ep_size), out=of_experts)
            b = new(b_given, memory_format=torch.contiguous_format)
            of_experts = b.view(-1, rank, source.num_experts)[..., source.local]
            torch.mul(b_grad[:, part].permute(2, 1, 0), scaling * ctx.ep_size, out=of_experts)
            found += [a, b]
        return tuple(found)
