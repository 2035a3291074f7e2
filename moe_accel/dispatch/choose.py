"""Which transport the tokens take, and why: what was asked for, what is possible, and what a measurement says.

`auto` is DeepEP between hosts, where a token crosses the network once a host instead of once a rank, and where both
were measured at prepare() and DeepEP was faster by more than noise; all-to-all everywhere else, and where DeepEP cannot
be used. All ranks of the job come to one answer: objections are gathered, times are those of the slowest rank.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_accel.dispatch import deepep, topology
from moe_accel.dispatch.alltoall import AllToAll
from moe_accel.errors import ConfigError, DependencyError
from moe_accel.ranks import gather
from moe_accel.report import Choice

ONE_HOST = (2, 4, 8)
SEVERAL_HOSTS = (16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Ranks of a group that `deep_ep.Buffer` has kernels and configurations for; between hosts it wants 8 ranks on each."""

MAX_HIDDEN = 8176
"""A warp of `deep_ep.Buffer` holds half a row of bf16 and a barrier of 8 bytes in 8192 bytes."""

MAX_LOCAL_EXPERTS = {"buffer": 128, "elastic": 256}

TOKENS, ROUNDS = 4096, 10
"""Tokens of a rank, and timed round trips, of the measurement."""

MARGIN = 0.95
"""DeepEP must take less than this share of all-to-all's time: times of ten rounds differ by some percent."""


@dataclass(frozen=True)
class Traffic:
    """What a model's layers send: E experts of a group, H hidden, K top-k."""

    num_experts: int
    hidden: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.hidden} wide, top-{self.top_k} of {self.num_experts}"


def check(asked: str, ep_size: int, device: torch.device) -> None:
    """Refuse what cannot be had, before there is a model.

    Raises:
        DependencyError: `deepep` without the package, or with one that cannot be used.
        ConfigError: `deepep` without a GPU.
    """
    if asked != "deepep" or ep_size == 1:
        return
    if not deepep.is_installed():
        raise DependencyError(
            "dispatcher=deepep needs the package deep_ep, which is not installed",
            "dispatcher: auto, or pip install 'moe-accel[deepep]'",
        )
    problem = deepep.problem(device)
    if problem is not None:
        error = ConfigError if device.type != "cuda" else DependencyError
        raise error(f"dispatcher=deepep cannot be used: {problem}", "dispatcher: auto; moe-accel doctor says more")


def choose(asked: str, group: Any, traffic: Traffic, device: torch.device) -> Choice:
    """The transport for a model, with the reason. A collective call of all ranks of the job, with a GPU.

    Args:
        asked: `auto`, `alltoall` or `deepep`.
        group: the `ep` group; None at ep_size 1.
        traffic: of the model's layers.
        device: of this rank.

    Raises:
        ConfigError: `deepep` does not fit the ranks or the model.
    """
    if group is None:
        return Choice("none", "ep_size 1: every rank has all experts")
    if asked == "alltoall":
        return Choice("alltoall", "asked for")
    if asked == "auto" and device.type != "cuda":
        return Choice("alltoall", "auto: it needs nothing but torch.distributed")
    problem = deepep.problem(device)
    hosts, link = _looked_at(group, device)
    if problem is None:
        problem = "; ".join(misfits(hosts, traffic)) or _objection(link, asked)
    problem = next(filter(None, gather(problem)), None)  # of any rank of the job, the first one's
    if problem is None:
        problem = _opened(group, traffic)
    if asked == "deepep":
        if problem is not None:
            raise ConfigError(f"dispatcher=deepep cannot be used: {problem}", "dispatcher: auto, or alltoall")
        return Choice("deepep", f"asked for: {deepep.implementation()}, {_told(hosts, link)}")
    if problem is not None:
        return Choice("alltoall", f"auto: {problem}")
    if max(gather(len(set(hosts)))) > 1:
        return Choice("deepep", f"auto: {_told(hosts, link)}")
    return _measured(group, traffic, device, _told(hosts, link))


def transport(choice: Choice, group: Any, num_local_experts: int) -> AllToAll | deepep.DeepEP:
    """The dispatcher that was chosen, for layers of this many experts a rank."""
    return (deepep.DeepEP if choice.value == "deepep" else AllToAll)(group, num_local_experts)


def misfits(hosts: list[str], traffic: Traffic) -> list[str]:
    """Every rule of DeepEP's implementation in use that a group, by its ranks' hosts, and a model break."""
    which, num_ranks, num_hosts = deepep.kind(), len(hosts), len(set(hosts))
    found = []
    if which == "buffer":
        sizes = SEVERAL_HOSTS if num_hosts > 1 else ONE_HOST
        if num_ranks not in sizes:
            where = f"{num_hosts} hosts" if num_hosts > 1 else "one host"
            found.append(f"ep_size={num_ranks} must be one of {', '.join(map(str, sizes))} on {where}")
        elif num_hosts > 1 and any(len(set(hosts[first : first + 8])) > 1 for first in range(0, num_ranks, 8)):
            found.append("between hosts it needs 8 neighbouring ranks of the ep group on each")
        if traffic.hidden > MAX_HIDDEN:
            found.append(f"hidden_size={traffic.hidden} must be at most {MAX_HIDDEN}")
    multiple = 16 if which == "buffer" else 8
    if traffic.hidden % multiple:
        found.append(f"hidden_size={traffic.hidden} must be a multiple of {multiple}")
    if traffic.num_experts // num_ranks > MAX_LOCAL_EXPERTS[which]:
        local, most = traffic.num_experts // num_ranks, MAX_LOCAL_EXPERTS[which]
        found.append(f"num_experts / ep_size = {local} must be at most {most}")
    if traffic.top_k > deepep.MAX_TOP_K:
        found.append(f"top-{traffic.top_k} must be at most top-{deepep.MAX_TOP_K}")
    return found


def _looked_at(group: Any, device: torch.device) -> tuple[list[str], str]:
    """Host of each rank of the group, and the worst link between two of its GPUs on one host."""
    found = topology.places(group, device)
    links = gather(topology.worst_link(found[dist.get_rank(group)], found), group)
    return [place.host for place in found], min(links, key=topology.LINKS.index)


def _objection(link: str, asked: str) -> str | None:
    if link in ("no peer access", "PCIe"):
        return f"its kernels need NVLink between the GPUs of an ep group, and there is {link}"
    if link == "one GPU" and asked == "auto":
        return "ranks of an ep group share a GPU, where times say nothing"
    return None


def _told(hosts: list[str], link: str) -> str:
    where = f"{len(set(hosts))} hosts" if len(set(hosts)) > 1 else "one host"
    return f"an ep group is on {where}, {'its ranks share a GPU' if link == 'one GPU' else f'GPUs linked by {link}'}"


def _opened(group: Any, traffic: Traffic) -> str | None:
    """Why the buffer cannot be allocated, on any rank of the job; None where it was."""
    problem = None
    try:
        deepep.DeepEP(group, traffic.num_experts // dist.get_world_size(group)).open(
            TOKENS, traffic.hidden, traffic.top_k
        )
    except (RuntimeError, AssertionError) as error:
        problem = f"its buffer cannot be made: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return next(filter(None, gather(problem)), None)


def _measured(group: Any, traffic: Traffic, device: torch.device, told: str) -> Choice:
    """The faster one of both, by round trips of made-up tokens."""
    num_local = traffic.num_experts // dist.get_world_size(group)
    candidates = [AllToAll(group, num_local), deepep.DeepEP(group, num_local)]
    of_ranks = gather([round_trip_ms(each, traffic, device) for each in candidates])
    alltoall_ms, deepep_ms = map(max, zip(*of_ranks, strict=True))
    numbers = f"{TOKENS} tokens {traffic}, there and back and their gradients"
    reason = f"auto: {numbers}: deepep {deepep_ms:.2f} ms, alltoall {alltoall_ms:.2f} ms on the slowest rank; {told}"
    if deepep_ms < MARGIN * alltoall_ms:
        return Choice("deepep", reason)
    deepep.close(group)
    return Choice("alltoall", reason)


def round_trip_ms(dispatcher: Any, traffic: Traffic, device: torch.device, num_tokens: int = TOKENS) -> float:
    """Milliseconds of a dispatch, a combine and the backward of both, for uniform routing. A collective call."""
    generator = torch.Generator(device).manual_seed(dispatcher.rank)
    shape = {"generator": generator, "device": device}
    x = torch.randn(num_tokens, traffic.hidden, **shape).bfloat16().requires_grad_()
    choices = torch.rand(num_tokens, traffic.num_experts, **shape).topk(traffic.top_k).indices
    weights = torch.rand(num_tokens, traffic.top_k, **shape).requires_grad_()
    upstream = torch.ones_like(x)

    def round_trip() -> None:
        x_r, _, weights_r, handle = dispatcher.dispatch(x, choices, weights)
        y = dispatcher.combine(x_r, handle)
        torch.autograd.backward([y, weights_r], [upstream, torch.ones_like(weights_r)])

    for _ in range(3):
        round_trip()
    _synchronize(device)
    dist.barrier(dispatcher.group)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        round_trip()
    _synchronize(device)
    return (time.perf_counter() - start) / ROUNDS * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
