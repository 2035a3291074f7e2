"""A device whose memory is arithmetic: what layers hold between forward and backward is a formula of their tokens.

It follows the layers of any model by torch's global module hooks, so it needs no device, and a test knows what should
fit. Going past `total` raises, as a device would.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class FakeMemory:
    """In whatever unit the test likes.

    Args:
        total: of the device.
        base: allocated all the time.
        holds: tokens -> what a kept layer holds until its backward.
        passes: tokens -> what a checkpointed one does.
        rest: tokens -> what comes on top when the loss is computed.
        others: held by others than tensors.
    """

    def __init__(
        self,
        total: int,
        base: int,
        holds: Callable[[int], int],
        passes: Callable[[int], int] = lambda tokens: tokens,
        rest: Callable[[int], int] = lambda tokens: tokens,
        others: int = 0,
    ) -> None:
        self.total, self.base, self.others = total, base, others
        self.holds, self.passes, self.rest = holds, passes, rest
        self.held = self.highest = 0
        self.retries = 0
        self.peaks: list[int] = []
        handle = nn.modules.module.register_module_forward_hook(self._after_layer)
        self.remove = handle.remove

    def _after_layer(self, layer: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(layer, GradientCheckpointingLayer) or not layer.training:
            return
        if torch._C._current_graph_task_id() != -1 or not output.requires_grad:
            return
        tokens = output.shape[:2].numel()
        amount = self.passes(tokens) if layer.gradient_checkpointing else self.holds(tokens)
        self.held += amount
        self._reach(self.base + self.held + self.rest(tokens))
        output.register_hook(lambda _gradient: self._give_back(amount))

    def _give_back(self, amount: int) -> None:
        self.held -= amount

    def _reach(self, amount: int) -> None:
        self.highest = max(self.highest, amount)
        self.peaks.append(amount)
        if amount > self.total - self.others:
            raise MemoryError(f"{amount} of {self.total - self.others}")

    def allocated(self) -> int:
        """Now."""
        return self.base + self.held

    def peak(self) -> int:
        """Since `forget_peak`."""
        return max(self.highest, self.allocated())

    def forget_peak(self) -> None:
        """From now on."""
        self.highest = 0

    def available(self) -> int:
        """Without what others hold."""
        return self.total - self.others

    def num_retries(self) -> int:
        """As often as the test says."""
        return self.retries
