"""Transports of tokens to the ranks that hold their experts, all behind one contract, which is DeepEP's.

`combine(experts(dispatch(x)))` is expert parallelism: the experts in the middle are the same function that computes all
experts on one GPU.

Sizes: N tokens of this rank, R rows received, H hidden, K top-k, e experts of this rank.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from moe_accel.dispatch.allgather import AllGather, AllGatherHandle
from moe_accel.dispatch.alltoall import AllToAll, AllToAllHandle
from moe_accel.dispatch.deepep import DeepEP, DeepEPHandle
from moe_accel.dispatch.halves import Arrival


class Handle(Protocol):
    """What a dispatch leaves for its combine, and for dispatching the same routing again.

    Attributes:
        choices: [R,K] int32, local expert of each choice of a received row, -1 where another rank has it.
        num_pairs: how many of `choices` are not -1, known on the host; None where it is not.
    """

    choices: Tensor
    num_pairs: int | None


class Dispatcher(Protocol):
    """A transport. Every rank of the group must make the same calls in the same order, also with no tokens (N = 0).

    Backward is a collective call too: what is returned must be used on every rank, x and weights both.
    """

    name: str
    rank: int  # of this process in the group: it holds experts rank * e to (rank + 1) * e - 1

    def dispatch(
        self,
        x: Tensor,
        choices: Tensor,
        weights: Tensor,
        handle: Any = None,
        beside: Callable[[], Any] | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Send each token once to every rank that holds one of its experts; differentiable in x and weights.

        Args:
            x: [N,H] tokens.
            choices: [N,K] integer, expert of each choice, counted over all ranks.
            weights: [N,K] routing weights, any floating dtype.
            handle: a `Handle` of an earlier dispatch, to repeat its routing: no counting, no wait for the device. The
                weights that arrive may be those of that dispatch: DeepEP repeats rows alone.
            beside: called once, when tokens are on their way and before anything waits for them; what it computes, and
                the backward of that, has the device to itself meanwhile. Not computed before the call: nothing that
                the tokens wait for.
            scale: what the gradients of x and weights are multiplied by, see `experts/scale.py`.

        Returns:
            x [R,H] and weights [R,K] in their dtypes, choices [R,K] local (-1: not here), and the `Handle`.
        """
        ...

    def combine(self, y: Tensor, handle: Any, scale: float = 1.0, keep: Any = None) -> Tensor:
        """Send rows back and sum them by token: y [R,H] -> [N,H], no view of anything; differentiable in y.

        Args:
            y: [R,H].
            handle: of the dispatch.
            scale: what the gradient of the sums is multiplied by.
            keep: an object that shall live as long as the autograd graph does.
        """
        ...


__all__ = [
    "AllGather",
    "AllGatherHandle",
    "AllToAll",
    "AllToAllHandle",
    "Arrival",
    "DeepEP",
    "DeepEPHandle",
    "Dispatcher",
    "Handle",
]
