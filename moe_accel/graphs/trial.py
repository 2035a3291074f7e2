"""What is played of recorded graphs, beside the same computation without them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-2
"""Of a gradient's norm: cuDNN's attention adds in another order every time."""
ROUNDING = 1e-5
"""Of the largest value of an output that is not computed exactly as recorded; of 16-bit values their own epsilon."""


@dataclass
class Round:
    """Of trials of all that is recorded of a model; a new number begins another."""

    number: int = 0


class Trial:
    """Of what is recorded of one module: played, and computed by the module, forward and backward, in every round.

    `exactly`: whether outputs must be the same to the bit, as where the module computes what was recorded.

    It is used when outputs and gradients agreed. What is recorded begins a round. So all modules are tried in the same
    step, in which nothing is recorded: what one's graphs do to the memory of another's is seen, in the order in which
    it happens.

    Attributes:
        problem: why it must not be used any more; empty: nothing.
        num_open: forwards, one after the other, without gradients that agree.
    """

    def __init__(self, round: Round, exactly: bool = True):
        self._round, self._began, self._passed = round, -1, -1
        self._exactly = exactly
        self.problem, self.num_open = "", 0

    @property
    def is_due(self) -> bool:
        """Whether it did not agree in this round yet."""
        return self._passed != self._round.number

    def compare_outputs(self, found: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """They agree where every number is the same, or as near as rounding, and NaN where the module has it."""
        self._began = self._round.number
        self.num_open += 1
        for one, other in zip(found, own, strict=True):
            room = 0.0 if self._exactly else _rounding(other)
            if not torch.allclose(one, other, rtol=0, atol=room, equal_nan=True):
                self._fail()

    def compare_gradients(
        self, found: Sequence[Tensor | None], own: Sequence[Tensor | None], given: Sequence[Tensor]
    ) -> None:
        """They agree where they are as near as those of two times of computing.

        Nothing is said by `given`, the gradients of the outputs, that are all zeros, or by any that are not finite, as
        in steps which a gradient scaler leaves out. The trial goes on in the next step.
        """
        agrees = near(found, own, given)
        if agrees:
            self._passed, self.num_open = self._began, 0
        elif agrees is not None:
            self._fail()

    def _fail(self) -> None:
        self.problem = "what was recorded is not what the module computes"
        self._round.number += 1


def near(found: Sequence[Tensor | None], own: Sequence[Tensor | None], given: Sequence[Tensor]) -> bool | None:
    """Whether gradients are within `TOLERANCE` of `own`; None where `given` or `own` says nothing.

    Args:
        found: of inputs and parameters, None where there is none.
        own: the same, of the module itself.
        given: of the outputs, at least one; both were made of them.
    """
    pairs = [(one, other) for one, other in zip(found, own, strict=True) if one is not None and other is not None]
    if sum(each is not None for each in (*found, *own)) != 2 * len(pairs):
        return False
    of_given, of_own = _norms(given), _norms([other for _, other in pairs] or given)
    off_by = _norms([one - other for one, other in pairs] or [torch.zeros_like(given[0])])
    says_something = of_given.any() & of_given.isfinite().all() & of_own.isfinite().all()
    says_something, is_near = torch.stack([says_something, (off_by <= TOLERANCE * of_own).all()]).tolist()
    return is_near if says_something else None


def _rounding(output: Tensor) -> float:
    """How far off an output may be that was computed in another order."""
    if not output.is_floating_point() or not output.numel():
        return 0.0
    largest = output.detach().nan_to_num(posinf=0, neginf=0).abs().max()
    return max(ROUNDING, torch.finfo(output.dtype).eps) * float(largest)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """[len(tensors)] fp32."""
    wide = [torch.promote_types(each.dtype, torch.float32) for each in tensors]
    norms = [torch.linalg.vector_norm(each, dtype=dtype) for each, dtype in zip(tensors, wide, strict=True)]
    return torch.stack([each.float() for each in norms])
