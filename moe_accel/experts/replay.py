"""Routing is decided once: activation-checkpoint recompute repeats the dispatch that forward made.

Recompute runs the router again, and a near-tie may fall the other way then. Rows would go to other ranks than in
forward, tensors would get other shapes, and torch stops with a CheckpointError (pytorch#171355). So forward records its
routing; recompute, which is known by running inside a backward pass, takes it up again and waits for no counts. Routing
weights are those of the recompute: where a tie fell the other way, one near-equal weight stands for another.

Which forward is being recomputed, where several are alive, is told by autograd's sequence numbers, which grow with
every operation of a thread: recompute starts when a node of its own region asks for a saved tensor, and the record made
last before that node is the region's. That holds on every rank by itself, whatever tokens it has.

A record lives exactly as long as the autograd graph of its forward: the graph holds it, the module's `Records` refer
to it weakly. A reentrant checkpoint builds no graph in forward; its recompute routes anew, which is safe there, since
nothing of the first forward is kept to disagree with.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_accel.backward import in_backward
from moe_accel.experts.routing import LocalRouting


@dataclass(eq=False)
class Record:
    """The routing of one forward of one experts module.

    Attributes:
        handle: of the dispatch.
        routing: the received rows, sorted by expert.
        sequence_nr: of autograd in this thread, when the forward was made.
        choices: [N,K] what the router chose.
        replayed: the recompute that took it up last: graph task, and sequence number of the node that started it.
    """

    choices: Tensor
    handle: Any = None
    routing: LocalRouting | None = None
    sequence_nr: int = field(default_factory=torch.autograd._get_sequence_nr)  # pyright: ignore[reportPrivateImportUsage]
    replayed: tuple[int, int] | None = None

    def agreement(self, choices: Tensor) -> int:
        """How many of the choices are these, in whatever order a token has them. Waits for the device."""
        if choices.shape != self.choices.shape:
            return -1
        return int((choices.sort(-1).values == self.choices.sort(-1).values).sum())


class Records:
    """The forwards of one module that a backward pass may still come for."""

    def __init__(self) -> None:
        self._alive: list[weakref.ref[Record]] = []

    def __len__(self) -> int:
        return len(self._living())

    def add(self, record: Record) -> None:
        """Refer to a record, weakly."""
        self._alive = [weakref.ref(each) for each in [*self._living(), record]]

    def find(self, choices: Tensor) -> Record | None:
        """The record of the forward that is being recomputed; None outside recompute, or where none was made.

        Args:
            choices: [N,K] what the router chose now: compared with the record's only where that is in doubt.

        Raises:
            RuntimeError: the module runs more than once in one checkpointed region, or backward entered the region
                ahead of its experts while an older forward is alive: the record cannot be told.
        """
        node = torch._C._current_autograd_node() if in_backward() else None
        if node is None or node.name() == "CheckpointFunctionBackward":  # reentrant: forward left no record
            return None
        sequence_nr = node._sequence_nr()
        made = sorted(self._living(), key=lambda each: each.sequence_nr)
        before = [each for each in made if each.sequence_nr <= sequence_nr]
        if not before:
            return None
        record, recompute = before[-1], (torch._C._current_graph_task_id(), sequence_nr)
        if record.replayed == recompute:
            raise RuntimeError("an experts module runs twice in one activation-checkpointed region")
        after = made[len(before) :]
        if after and after[0].agreement(choices) > record.agreement(choices):
            raise RuntimeError(
                "backward entered an activation-checkpointed region ahead of its experts while the graph of an older "
                "forward is alive: call backward on the older loss first, or drop it"
            )
        record.replayed = recompute
        return record

    def _living(self) -> list[Record]:
        return [record for each in self._alive if (record := each()) is not None]
