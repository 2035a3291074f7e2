"""The experts function that transformers calls instead of its own.

Registered as `moe_accel` in transformers' `ExpertsInterface`; what a module computes with is in its `Settings`.

Sizes: N tokens of this rank, R rows received, H hidden, K top-k, E experts, e experts of this rank.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from moe_accel.backward import in_backward
from moe_accel.dispatch import Arrival, Dispatcher
from moe_accel.experts.adapters import active_ranks, factors
from moe_accel.experts.beside import Beside
from moe_accel.experts.fused import fused_experts
from moe_accel.experts.gated import why_not_gated
from moe_accel.experts.joined import Joined, join
from moe_accel.experts.later import Products, collecting
from moe_accel.experts.reference import reference_experts
from moe_accel.experts.replay import Record, Records
from moe_accel.experts.routing import LocalRouting, counts_of, sort_by_expert, sort_with_room
from moe_accel.experts.weights import projections
from moe_accel.kernels import te, te_rows
from moe_accel.kernels.grouped import TORCH

NAME = "moe_accel"


@dataclass(frozen=True)
class KnownSizes:
    """How expert parallelism is computed in tensors of known sizes.

    Attributes:
        behind: [N,1] bool, which tokens are only room for more, and choose no expert; None: all are there.
    """

    behind: Tensor | None = None


_known_sizes: ContextVar[KnownSizes | None] = ContextVar("known_sizes", default=None)


@dataclass
class Settings:
    """How one experts module computes.

    Attributes:
        kernels: `fused`, `reference` or `te`, which is `fused` but for `of_te`.
        dispatcher: transport to the other ranks' experts; None where this rank has all of them.
        ep_size: ranks that share the experts; 1 without a dispatcher.
        ep_rank: which of them this is.
        lean: whether backward computes the first projection again, rather than its output being kept.
        counting: whether to count `load`.
        dtype: in which weights kept in another are computed, as FSDP2's mixed precision says, where FSDP2 is not there
            to cast them; of tokens that are sent, too. None: no cast but autocast's.
        of_te: what TransformerEngine computes under `te`: some of `experts` (their grouped GEMMs) and `permutation`.
        beside: the shared expert of the same block, where it is computed while tokens travel.
        joined: weights of this module that have room for their adapters, by name.
        apart: rank of the adapters of those that had, before a state dict was made of them.
        of_known_sizes: the transport of `known_sizes`; None where experts are not computed so.
        ends: [e] int32, where the pairs of each expert ended that were sorted last under `known_sizes`.
        load: [e] int64 on the device, tokens computed by each of this rank's experts so far; None while there are none.
        records: routing of the forwards that may be recomputed.
    """

    kernels: str = "fused"
    dispatcher: Dispatcher | None = None
    ep_size: int = 1
    ep_rank: int = 0
    lean: bool = False
    counting: bool = False
    dtype: torch.dtype | None = None
    of_te: tuple[str, ...] = ("experts",)
    beside: Beside | None = None
    joined: dict[str, Joined] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)
    of_known_sizes: Dispatcher | None = None
    ends: Tensor | None = None
    load: Tensor | None = None
    records: Records = field(default_factory=Records)

    def __deepcopy__(self, memo: dict) -> "Settings":
        """A copied module shares the transport (process groups cannot be copied) and starts without history."""
        copied = Settings(*self._plain)
        copied.beside, copied.of_known_sizes = copy.deepcopy(self.beside, memo), self.of_known_sizes
        return copied

    def __reduce__(self) -> tuple:
        """Pickled as it is copied."""
        return _loaded, self._plain

    @property
    def multiplies_by_te(self) -> bool:
        """Whether TransformerEngine computes the grouped GEMMs."""
        return self.kernels == "te" and "experts" in self.of_te

    @property
    def _plain(self) -> tuple[Any, ...]:
        """What it is made of, in the order of the fields, up to those with a history."""
        of_ranks = self.dispatcher, self.ep_size, self.ep_rank
        return self.kernels, *of_ranks, self.lean, self.counting, self.dtype, self.of_te


def _loaded(*values: Any) -> Settings:
    """Settings from a file, maybe in a process that has prepared nothing and could not compute with them."""
    register()
    return Settings(*values)


_DEFAULT = Settings()


def register() -> None:
    """Make `experts_implementation="moe_accel"` known to transformers."""
    ExpertsInterface.register(NAME, experts_forward)


def install(module: Any, settings: Settings) -> None:
    """Let an experts module compute with `settings`."""
    module.config._experts_implementation = NAME
    module._moe_accel = settings


def join_adapters(model: nn.Module) -> None:
    """Let adapters be computed in the GEMMs of the experts' own weights, where those are frozen and whole on a GPU.

    After the model is where it trains: weights that move later, or that somebody replaces, lose this and nothing else.
    """
    for module, name, rank in active_ranks(model):
        settings = settings_of(module)
        if settings.kernels != "reference" and not settings.multiplies_by_te:
            was_joined = bool(settings.joined)
            settings.apart = {name: rank}
            _join(module, settings)
            if settings.joined and not was_joined:
                module.register_state_dict_pre_hook(_take_apart)


def _take_apart(module: Any, *_: Any) -> None:
    """Before a state dict is made: safetensors refuses tensors that are a part of their memory."""
    settings = settings_of(module)
    for name, joined in settings.joined.items():
        if joined.leave(module, name):
            settings.apart[name] = joined.rank
    settings.joined = {}


def _join(module: Any, settings: Settings) -> None:
    for name, rank in settings.apart.items():
        joined = join(module, name, rank)
        if joined is not None:
            settings.joined[name] = joined
    settings.apart = {}


def settings_of(module: nn.Module) -> Settings:
    """The module's settings; those of one GPU where nothing was installed."""
    return getattr(module, "_moe_accel", _DEFAULT)


@contextmanager
def known_sizes(products: Products | None = None, behind: Tensor | None = None) -> Iterator[None]:
    """A block in which expert parallelism is computed in tensors whose sizes do not depend on what routers choose, so
    that it can be recorded: tokens go to all ranks, and there is room for the most rows that experts can get.

    For what has `Settings.of_known_sizes`, and the same number of tokens on all ranks, of which some may be `behind`
    those that are there, see `KnownSizes`. No load is counted: see `count_again`. `products`: where backward puts
    gradients of weights that it leaves to its caller, see `later.py`.
    """
    before = _known_sizes.set(KnownSizes(behind))
    try:
        with collecting(products):
            yield
    finally:
        _known_sizes.reset(before)


def count_again(settings: Settings) -> None:
    """Add to the load what was computed last under `known_sizes`, by whatever computed it."""
    if settings.counting and settings.ends is not None:
        _add_load(settings, counts_of(settings.ends))


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of each token's experts, wherever they are.

    Args:
        module: a transformers experts module.
        hidden_states: [N,H].
        top_k_index: [N,K] int64, expert of each choice.
        top_k_weights: [N,K], the dtype of hidden_states or fp32.

    Returns:
        [N,H] in the dtype of hidden_states.
    """
    settings = settings_of(module)
    if settings.dispatcher is not None:
        parallel: Any = _expert_parallel
        return parallel(module, settings, hidden_states, top_k_index, top_k_weights)
    routing = None
    if settings.kernels != "reference" or settings.counting:
        routing = sort_by_expert(top_k_index, module.num_experts)
    _count(settings, routing)
    return _compute(module, settings, hidden_states, top_k_index, top_k_weights, routing)


@torch.compiler.disable  # row counts are data: a compiled graph would be made anew for every batch
def _expert_parallel(module: Any, settings: Settings, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    """`combine(experts(dispatch(x)))`, with the gradient scale of `scale.py` in the first and the last."""
    sizes = _known_sizes.get()
    if sizes is not None and settings.of_known_sizes is not None:
        choices = choices if sizes.behind is None else choices.masked_fill(sizes.behind, -1)
        return _with_known_sizes(module, settings, x, choices, weights)
    dispatcher: Any = settings.dispatcher
    num_local_experts = module.num_experts // settings.ep_size
    of_output, x = x.dtype, x if settings.dtype is None else x.to(settings.dtype)
    record = settings.records.find(choices)
    new = Record(choices) if record is None and torch.is_grad_enabled() and not in_backward() else None
    beside, scale = settings.beside and settings.beside.work(), float(settings.ep_size)
    sent = dispatcher.dispatch(x, choices, weights, record and record.handle, beside, scale)
    x_r, choices_r, weights_r, handle = sent
    routing = record and record.routing
    if routing is None:
        routing = sort_by_expert(choices_r, num_local_experts, handle.num_pairs)
    if new is not None:
        new.handle, new.routing = handle, routing
        settings.records.add(new)
    _count(settings, routing)
    y_r = _compute(module, settings, x_r, choices_r, weights_r, routing)
    # Scaled in combine and not by a function around it, which would return a view: `experts_out += shared_out` of a
    # model on a view would drop the hook by which FSDP2 gathers the experts for backward.
    return dispatcher.combine(y_r, handle, 1 / scale, new).to(of_output)


def _with_known_sizes(module: Any, settings: Settings, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    """The same without a wait for the device, and lean: what there is room for is not kept for backward."""
    dispatcher: Any = settings.of_known_sizes  # an `AllGather`
    of_output, x = x.dtype, x if settings.dtype is None else x.to(settings.dtype)
    beside, scale = settings.beside and settings.beside.work(), float(settings.ep_size)
    there, back = Arrival(is_awaited=True), Arrival()
    try:
        x_r, choices_r, weights_r, handle = dispatcher.dispatch(x, choices, weights, None, beside, scale, there)
        routing = sort_with_room(choices_r, module.num_experts // settings.ep_size)
    finally:  # after an error, too: see `halves.travel`
        there.wait()
    settings.ends = routing.ends
    y_r = _compute(module, settings, x_r, choices_r, weights_r, routing, True, back)
    for place in settings.joined.values():
        place.is_recorded = True
    return dispatcher.combine(y_r, handle, 1 / scale, arrival=back).to(of_output)


def _compute(
    module: Any,
    settings: Settings,
    x: Tensor,
    choices: Tensor,
    weights: Tensor,
    routing: LocalRouting | None,
    lean: bool = False,
    arrival: Arrival | None = None,
) -> Tensor:
    norm_scale = float(settings.ep_size)
    if settings.apart and torch.is_grad_enabled():
        _join(module, settings)
    ep = settings.ep_rank, settings.ep_size
    for name, place in list(settings.joined.items()):
        if not place.is_of(module, name):  # a copy of the experts that nobody uses
            del settings.joined[name]
    joined = settings.joined if settings.joined and why_not_gated(module) is None else {}
    up, down = (factors(module, name, *ep, joined, settings.dtype) for name in projections(module))
    if settings.kernels == "reference" or routing is None:
        return reference_experts(module, x, choices, weights, norm_scale, (up, down))
    how: Any = (module, x, routing, weights, norm_scale, (up, down), lean or settings.lean)
    if settings.kernels == "te":
        with_te: Any = _with_te
        return with_te(settings, choices.shape[1], *how)
    return fused_experts(*how, dtype=settings.dtype, arrival=arrival)


@torch.compiler.disable  # sizes of groups on the host: a compiled graph would be made anew for every batch
def _with_te(settings: Settings, top_k: int, module: Any, x: Tensor, routing: LocalRouting, *how: Any) -> Tensor:
    gemm = TORCH
    if settings.multiplies_by_te:
        gemm, routing = te.GEMM, replace(routing, ends=routing.ends_on_host)
    if "permutation" in settings.of_te:
        gemm, routing = te_rows.moving(gemm), replace(routing, rows=te_rows.with_places(routing.rows, top_k))
    return fused_experts(module, x, routing, *how, gemm=gemm, dtype=settings.dtype)


def _count(settings: Settings, routing: LocalRouting | None) -> None:
    if settings.counting and routing is not None and not in_backward():  # recompute counts no token twice
        _add_load(settings, routing.counts())


def _add_load(settings: Settings, counts: Tensor) -> None:
    settings.load = counts if settings.load is None else settings.load + counts
