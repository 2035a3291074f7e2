"""Blocks with experts as CUDA graphs, in expert parallelism: router, dispatch, experts and combine as one launch.

A recorded block exchanges tokens with other ranks, so what one of them does all have to do: play it, record it, or
compute it as ever. They agree on that once in a forward of the model, at its first block, through their hosts: whether
each has been called as before, with no more tokens than there is room for, and finds its blocks as they were recorded.
What is recorded is computed in tensors of known sizes (`experts.known_sizes`); the module's own computation, which a
trial compares with, is the usual one.

It takes the GPU longer, since what is kept of an expert's first projection otherwise is computed once more in backward,
and spares the host some hundred launches and one wait a layer: for few tokens a GPU.
"""

import os
import socket
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_accel import experts
from moe_accel.backward import in_backward
from moe_accel.graphs.agreement import Agreement, Decision
from moe_accel.graphs.calls import Given, Unusual, Watched, given
from moe_accel.graphs.module import RECORDINGS, Graphs, check_surroundings
from moe_accel.graphs.record import Recording
from moe_accel.ranks import before_groups_end, gather

MOST_RANKS = 8
"""To more, an all-gather sends several times what all-to-all does."""


def why_no_blocks(group: Any, dispatcher: str, kernels: str, used: Sequence[tuple[str, Any]]) -> str | None:
    """Why blocks with experts are not recorded; None where they may be. A collective call of the `ep` group.

    Args:
        group: of the ranks that share the experts, each of which has its own alone.
        dispatcher: transport of tokens.
        kernels: how experts are computed.
        used: the experts, by name.
    """
    if dispatcher != "alltoall":
        return f"tokens travel by {dispatcher}"
    if kernels != "fused":
        return f"experts are computed by {kernels}"
    reasons = sorted({why for _, module in used if (why := experts.why_not_gated(module)) is not None})
    if reasons:
        return f"experts with {reasons[0]}"
    if group.size() > MOST_RANKS:
        return f"an ep group of {group.size()} ranks, to all of which all tokens would go; {MOST_RANKS} at most"
    if len(set(gather(socket.gethostname(), group))) > 1:
        return "an ep group on several hosts"
    return None


def let_nccl_record() -> None:
    """Have NCCL exchange recorded tensors like any others, unless the user says how.

    What it registers of recorded memory hangs where that is of expandable segments (NCCL 2.28, two H200), and gains
    nothing: 12 layers of Qwen3-30B-A3B's shapes, 4096 tokens a rank, 106 to 116 ms a step with it, 105 to 111 without.
    """
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


_agreements: weakref.WeakSet[Agreement] = weakref.WeakSet()


def outlive_none(agreement: Agreement) -> None:
    """Have the graphs of these blocks destroyed before NCCL's communicators, which would wait for it for ever.

    See pytorch#115388.
    """
    _agreements.add(agreement)
    before_groups_end(_destroy_graphs)


def _destroy_graphs(group: Any) -> None:
    """Of all blocks, where all groups go: none is played any more."""
    for agreement in list(_agreements) if group is None else ():
        agreement.end()


class BlockGraphs(Graphs):
    """Of one block: what is recorded, which all ranks play together.

    Attributes:
        agreement: of the model's blocks.
        why_not: why it cannot be recorded as it is; empty: it can.
    """

    def __init__(self, agreement: Agreement):
        super().__init__(agreement.recorder)
        self.agreement, self.why_not = agreement, ""
        agreement.add(self)

    def __deepcopy__(self, memo: dict) -> "BlockGraphs":
        agreement = memo.get(id(self.agreement)) or self.agreement.__deepcopy__(memo)
        copied = memo[id(self)] = BlockGraphs(agreement)
        return copied

    def __reduce__(self) -> tuple:
        return BlockGraphs, (self.agreement,)

    def has_ended(self, about_to_record: bool) -> bool:
        """Whether it must not be played any more, or cannot be recorded."""
        module = self.owner and self.owner()
        if about_to_record and module is not None and not self.why_not:
            self.why_not = Watched(module).problem(maybe_sharded=True) or ""
            if self.recorded >= RECORDINGS:
                self.why_not = "its parameters or attributes change all the time"
        has_problem = self.recording is not None and bool(self.recording.trial.problem)
        return self.recorded > RECORDINGS or has_problem or bool(self.why_not)

    def drop(self) -> None:
        """Forget what is recorded."""
        super().drop()
        module = self.owner and self.owner()
        if module is not None:
            _settings(module).ends = None

    def is_as_recorded(self) -> bool:
        """Whether what is recorded is of this era and of the module as it is."""
        module = self.owner and self.owner()
        recording = self.recording
        return (
            module is not None
            and recording is not None
            and recording.era == self.recorder.era
            and recording.watched.is_same(module, maybe_sharded=True)
        )

    def call(self, module: nn.Module, own: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output: what all ranks decided to do.

        Raises:
            RuntimeError: this block was called unlike before, after all ranks had agreed to play it.
        """
        if self.agreement.why_ended is not None or in_backward():
            self._end(module)
            return own(*args, **kwargs)
        if not _trains(module, (*args, *kwargs.values())):
            return own(*args, **kwargs)
        self.own(module)
        found, why = None, ""
        try:
            check_surroundings()
            found = given(self.recorder.device_type, args, kwargs)
        except Unusual as unusual:
            why = str(unusual)
        decision, recording = self.agreement.decide(self, found), self.recording
        self.passed_by = self.passed_by if why else 0
        if why:
            self._pass_by(module, why)
        if decision is Decision.RECORD and found is not None and not self.why_not:
            self._record_now(module, own, found)
        if decision in (Decision.COMPUTE, Decision.RECORD) or found is None or recording is None:
            return own(*args, **kwargs)
        # As ever on all ranks, too, since the script says so: what is called twice in a forward, and what was not
        # called, or not so (checkpointed), in the forward in which all recorded: above.
        if recording.is_pending or not self.recorder.may_play(recording):
            return own(*args, **kwargs)
        if not (recording.takes(found) and recording.watched.is_same(module)):
            raise RuntimeError(
                f"cuda_graphs: {type(module).__name__} was changed, or called unlike in the steps before, after all "
                "ranks had agreed to play what is recorded\nhint: moe_config: {cuda_graphs: attention}"
            )
        if decision is Decision.PLAY:
            output = recording.play(found, own)
            experts.count_again(_settings(module))
            return output
        self.tell_if_open(module, recording)
        return recording.play(found, own, tries=True)

    def _end(self, module: nn.Module) -> None:
        """Say why, once: what this rank found, or all, or that another one did."""
        if self.agreement.why_ended is None:
            return
        problem = self.recording.trial.problem if self.recording is not None else self.why_not
        if problem and self.recorded <= RECORDINGS:
            self._refuse(module, problem)
        elif self.recorded <= RECORDINGS:
            why = self.agreement.why_ended or "what a block, or another rank, says"
            self._tell(module, f"computed without a CUDA graph, because of {why}")
        self._let_go()
        self.recorder.let_go()

    def _record_now(self, module: nn.Module, own: Callable, found: Given) -> None:
        """Record this call, as all ranks do: each computes it once more with them, before."""
        self.recorded += 1
        sizes = self.agreement.sizes_for(found)
        around = partial(experts.known_sizes, behind=sizes.behind)
        try:
            self.recording = Recording(self.recorder, Watched(module), own, found, around, sizes)
        except torch.OutOfMemoryError as error:  # of this rank: the others would wait for it
            hint = "moe_config: {cuda_graphs: attention} needs no room for all pairs of tokens and experts"
            raise torch.OutOfMemoryError(f"{error}\nhint: {hint}") from error
        except (RuntimeError, Unusual) as error:  # of all ranks, as they compute the same
            self._refuse(module, str(error).strip().partition("\n")[0])


def _settings(block: nn.Module) -> Any:
    """Of the experts in a block."""
    return next(experts.settings_of(each) for each in block.modules() if hasattr(each, "_moe_accel"))


def _trains(module: nn.Module, given: Sequence[Any]) -> bool:
    """Whether a call has a backward."""
    given = [each for each in given if isinstance(each, torch.Tensor)]
    return any(each.requires_grad for each in given) or any(each.requires_grad for each in module.parameters())
