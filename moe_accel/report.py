"""What prepare() did to a model, said once."""

import sys
from dataclasses import dataclass

from moe_accel.version import VERSION


@dataclass(frozen=True)
class Choice:
    """Something that was asked for or chosen, and why."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


@dataclass(frozen=True)
class Report:
    """What was done to one model.

    Attributes:
        model: class name.
        mesh: how the ranks are arranged.
        num_swapped: experts modules that compute with moe-accel, which is all that the model has.
        experts_classes: their class names.
        num_experts: experts of a layer, as text where layers differ.
        num_local_experts: those of them on each rank.
        dispatcher: transport of tokens.
        kernels: how a rank computes.
        block: how norms, rotary embeddings and routers are computed.
        loss: how the loss of `labels=` is computed.
        padding: whether padding is computed in training.
        num_expert_parameters: elements of all experts of the whole model.
        num_trainable: those of them that require a gradient.
        notes: anything else that the user should know.
    """

    model: str
    mesh: Choice
    num_swapped: int
    experts_classes: str
    num_experts: str
    num_local_experts: str
    dispatcher: Choice
    kernels: Choice
    block: Choice
    loss: Choice
    padding: Choice
    num_expert_parameters: int
    num_trainable: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        trainable = f"{short(self.num_trainable)} of {short(self.num_expert_parameters)} expert parameters"
        if not self.num_trainable:
            trainable += " (all experts are frozen)"
        rows = {
            "mesh": self.mesh,
            "experts": f"{self.num_swapped} of {self.num_swapped} layers of {self.experts_classes}: "
            f"{self.num_experts} experts, {self.num_local_experts} on each rank",
            "dispatcher": self.dispatcher,
            "kernels": self.kernels,
            "block": self.block,
            "loss": self.loss,
            "padding": self.padding,
            "trainable": trainable,
        }
        lines = [f"moe-accel {VERSION}: {self.model}"]
        lines += [f"  {name:<11} {value}" for name, value in rows.items()]
        lines += [f"  {'note':<11} {note}" for note in self.notes]
        return "\n".join(lines)


def say(report: Report) -> None:
    """Print a report to stderr."""
    print(report, file=sys.stderr, flush=True)


def short(number: int) -> str:
    """A count as people say it, of three digits: 1.03 T, 29 B, 384 M, 12.3 K, 512."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= 0.9995 * size:  # rounds up to 1: 999,999 is 1 M, not 1e+03 K
            return f"{number / size:.3g} {unit}"
    return str(number)
