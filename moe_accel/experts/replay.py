"""Routing is decided once: activation-checkpoint recompute repeats the dispatch that forward made.

Recompute runs the router again, and a near-tie may fall the other way then. Rows would go to other ranks than in
forward, tensors would get other shapes, and torch stops with a CheckpointError (pytorch#171355). So forward records its
routing; recompute, which is known by running inside a backward pass, takes it up again and waits for no counts.

A record lives exactly as long as the autograd graph of its forward: the graph holds it, the module's `Records` refer
to it weakly. A reentrant checkpoint builds no graph in forward; its recompute routes anew, which is safe there, since
nothing of the first forward is kept to disagree with.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_accel.experts.routing import LocalRouting


@dataclass(eq=False)
class Record:
    """The routing of one forward of one experts module.

    Attributes:
        choices: [N,K] what the router chose in forward.
        handle: of the dispatch.
        routing: the received rows, sorted by expert.
        done: backward has passed.
    """

    choices: Tensor
    handle: Any = None
    routing: LocalRouting | None = None
    done: bool = False


class Records:
    """The forwards of one module that a backward pass may still come for."""

    def __init__(self) -> None:
        self._alive: list[weakref.ref[Record]] = []

    def add(self, record: Record) -> None:
        """Refer to a record, weakly."""
        self._alive = [each for each in self._alive if each() is not None]
        self._alive.append(weakref.ref(record))

    def find(self, choices: Tensor) -> Record | None:
        """The forward that is being recomputed, or None: outside recompute, or nothing was recorded.

        Nearly always there is one candidate, and no wait for the device. Of several (two forwards before a backward,
        or an old loss that still holds its graph) it is the one whose choices agree best with those just made.
        """
        if not in_backward():
            return None
        candidates = [record for ref in self._alive if (record := ref()) is not None]
        candidates = [record for record in candidates if record.choices.shape == choices.shape]
        waiting = [record for record in candidates if not record.done]
        if len(waiting) == 1:
            if choices.numel():
                share = (waiting[0].choices == choices).float().mean()
                message = "activation-checkpoint recompute met the routing of another forward"
                torch.ops.aten._assert_async.msg(share > 0.5, message)
            return waiting[0]
        best, agreement = None, 0.5
        for record in candidates:
            share = float((record.choices == choices).float().mean()) if choices.numel() else 1.0
            if share > agreement:
                best, agreement = record, share
        return best


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, where the only forwards are recomputed ones."""
    return torch._C._current_graph_task_id() != -1
