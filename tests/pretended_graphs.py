"""What stands for CUDA graphs where there is no GPU: it computes again, into the same memory.

It spoils what a graph may spoil: all that was made by others and not copied, and what those recorded later keep.
"""

import functools
import weakref
from contextlib import nullcontext

import torch

from moe_accel import graphs
from moe_accel.graphs.recorder import Recorder


class Pretended(Recorder):
    """Records what to call, and calls it."""

    device_type = "cpu"

    def __init__(self):
        super().__init__()
        self.kept = weakref.WeakKeyDictionary()  # recording: its autograd graph
        self.made = weakref.WeakKeyDictionary()  # recording: what it has made, in memory that is not its own
        self.calls = weakref.WeakKeyDictionary()  # recording: the module, weakly, and its own forward

    def beside(self):
        return nullcontext()

    def refusing_to_wait(self):
        return nullcontext()

    def mark(self):
        return None

    def compute_beside(self, products):
        outs = [{"out": torch.empty_like(each.matrices)} if each.may_be_beside else {} for each in products]
        return [each.compute(*each.operands, **out) for each, out in zip(products, outs, strict=True)]

    def borrow(self, tensor):
        return tensor

    def made_by(self, recording, made, is_forward):
        if is_forward:
            return made[1]
        return [*made, *(each for product in recording._left for each in product.operands)]

    def record(self, work):
        recording, made = work.func.__self__, work()
        autocast = functools.partial(  # a graph computes in the dtypes in which it was recorded
            torch.autocast, "cpu", torch.get_autocast_dtype("cpu"), enabled=torch.is_autocast_enabled("cpu")
        )
        recorded = weakref.ref(recording)
        is_forward = work.func.__name__ == "_compute_recorded"
        if is_forward:
            (call,) = work.args
            self.calls[recording] = weakref.ref(call.__self__), call.__func__
        ours = [each.detach() for each in self.made_by(recording, made, is_forward) if each is not None]
        self.made.setdefault(recording, []).extend(ours)
        if is_forward:
            self.kept[recording] = made[1]

        def play():
            recording = recorded()
            for other, tensors in self.made.items():
                for each in tensors:
                    each.fill_(torch.nan if each.is_floating_point() else 0)
                if other.number > recording.number:
                    self.kept.pop(other, None)
            with autocast():
                if is_forward:
                    owner, function = self.calls[recording]
                    found = self.kept[recording] = recording._compute_recorded(functools.partial(function, owner()))[1]
                else:
                    found = recording._differentiate_recorded(self.kept[recording])
                    found = self.made_by(recording, found, is_forward)
            for one, each in zip(ours, [each for each in found if each is not None], strict=True):
                one.copy_(each)

        return play, made


def pretend(patch):
    """Let `cuda_graphs` of `moe_config` be that, by a pytest.MonkeyPatch."""
    install = graphs.install
    patch.setattr(graphs, "Recorder", Pretended)
    patch.setattr(graphs, "install", lambda model, device, *how: install(model, torch.device("cuda"), *how))
