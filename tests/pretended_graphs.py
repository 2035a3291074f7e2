"""What stands for CUDA graphs where there is no GPU: it computes again, into the same memory.

It spoils what a graph may spoil: all that was made by others and not copied, and what those recorded later keep.
"""

import functools
import weakref
from contextlib import nullcontext

import torch

from moe_accel import graphs
from moe_accel.graphs.record import Recorder


class Pretended(Recorder):
    """Records what to call, and calls it."""

    device_type = "cpu"

    def __init__(self):
        super().__init__()
        self.kept = weakref.WeakKeyDictionary()  # recording: its autograd graph
        self.made = weakref.WeakKeyDictionary()  # recording: what it has made, in memory that is not its own

    def beside(self):
        return nullcontext()

    def refusing_to_wait(self):
        return nullcontext()

    def borrow(self, tensor):
        return tensor

    def record(self, work):
        recording, recorded = work.__self__, weakref.ref(work.__self__)
        owner, function = weakref.ref(recording._call.__self__), recording._call.__func__
        given, made = recording._given, work()
        is_forward = work.__name__ == "_compute"
        ours = [each.detach() for each in (made[1] if is_forward else made) if each is not None]
        self.made.setdefault(recording, []).extend(ours)
        if is_forward:
            self.kept[recording] = made[1]

        def play():
            recording = recorded()
            for other, tensors in self.made.items():
                for each in tensors:
                    each.fill_(torch.nan)
                if other.number > recording.number:
                    self.kept.pop(other, None)
            was, outputs = dict(vars(recording)), recording._outputs
            recording._call, recording._given = functools.partial(function, owner()), given
            if is_forward:
                found = self.kept[recording] = recording._compute()[1]
            else:
                recording._outputs = self.kept[recording]
                found = recording._differentiate()
                recording._outputs = outputs
            for name in {"_call", "_given"} - was.keys():
                delattr(recording, name)
            for one, each in zip(ours, [each for each in found if each is not None], strict=True):
                one.copy_(each)

        return play, made


def pretend(patch):
    """Let `cuda_graphs` of `moe_config` be that, by a pytest.MonkeyPatch."""
    install = graphs.install
    patch.setattr(graphs, "Recorder", Pretended)
    patch.setattr(graphs, "install", lambda model, device, *how: install(model, torch.device("cuda"), *how))
