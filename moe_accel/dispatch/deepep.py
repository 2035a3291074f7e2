"""The transport of DeepEP (https://github.com/deepseek-ai/DeepEP): one kernel a direction, over NVLink and RDMA.

The only file that imports `deep_ep`. Two implementations behind one class (`buffers.py`): `Buffer` (1.2, kept in 2.x),
which is taken where it is there, and `ElasticBuffer` (2.x); MOE_ACCEL_DEEPEP=buffer or elastic asks for one of them.
Read in their sources, 1.2.1 and 2.1.0:

- Rows are bf16, routing weights fp32. Combine sums the rows of the ranks of a token in fp32 and rounds once; between
  nodes once a node, then once more. Elastic adds two rows in bf16, which is one rounding, too.
- Weights are not applied by DeepEP: our experts multiply by them before combine, as with all-to-all.
- A dispatch waits on the host for the row counts; with the handle of an earlier one it waits for nothing. The handle
  repeats rows and no weights, so a recomputed forward gets the weights of the first one, not those of its own router.
- Destroying a buffer is a collective call that waits for the other ranks, and the process group must still be there.

Sizes: N tokens of this rank, R rows received, H hidden, K top-k, E experts of the group, e experts of this rank.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_accel.dispatch.buffers import Buffer, Elastic
from moe_accel.dispatch.halves import scaled, travel
from moe_accel.errors import ConfigError
from moe_accel.ranks import before_groups_end

ENV_VAR = "MOE_ACCEL_DEEPEP"
KINDS = {"buffer": "Buffer", "elastic": "ElasticBuffer"}
"""Our names of the implementations, and the package's."""

MAX_TOP_K = 32


@dataclass(frozen=True)
class DeepEPHandle:
    """What a dispatch leaves.

    Attributes:
        choices: [R,K] int32, local expert of each choice of a received row, -1 where another rank has it.
        num_pairs: how many of `choices` are not -1.
        weights: [R,K] fp32, routing weights as received; 0 where another rank has the expert.
        dtype: of the tokens, which combine gives back.
        num_tokens: N.
        native: the handle of `deep_ep`.
    """

    choices: Tensor
    num_pairs: int
    weights: Tensor
    dtype: torch.dtype
    num_tokens: int
    native: Any


class DeepEP:
    """Dispatcher over the ranks of one process group, each holding `num_local_experts` consecutive experts."""

    name = "deepep"

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int):
        self.group, self.num_local_experts = group, num_local_experts
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.num_experts = num_local_experts * self.num_ranks
        self.buffers = _buffers(group, kind())

    def open(self, num_tokens: int, hidden: int, top_k: int) -> None:
        """Allocate the buffer now, not at the first dispatch. A collective call, with the same sizes on all ranks."""
        self.buffers.make_room(num_tokens, hidden, top_k)

    def dispatch(
        self,
        x: Tensor,
        choices: Tensor,
        weights: Tensor,
        handle: DeepEPHandle | None = None,
        beside: Callable[[], Any] | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, DeepEPHandle]:
        """See `Dispatcher.dispatch`; x is bf16 there, too, where autocast lets it be sent as such.

        With a handle, weights are those of its dispatch, and their gradient goes to the new ones. Without one the host
        waits for row counts within DeepEP's call: that comes after `beside`, so that the device is at work meanwhile.

        Raises:
            ConfigError: dtype or top-k are none that DeepEP has.
        """
        if choices.shape[1] > MAX_TOP_K:
            raise ConfigError(f"dispatcher=deepep sends at most {MAX_TOP_K} choices a token, not {choices.shape[1]}")
        transfer = _Transfer(self, choices, handle, x.dtype)
        x_r, weights_r = travel(_as_bf16(x), weights.float(), transfer, beside, scale)
        return x_r, transfer.handle.choices, weights_r.to(weights.dtype), transfer.handle

    def combine(self, y: Tensor, handle: DeepEPHandle, scale: float = 1.0, keep: Any = None) -> Tensor:
        """See `Dispatcher.combine`; in the dtype of the tokens dispatched."""
        combined: Any = _Combine.apply(_as_bf16(y), self, handle, scale, keep)
        return combined.to(handle.dtype)

    # What follows starts, and gives a function that lets the current stream wait for the result.

    def send(
        self, x: Tensor, choices: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Callable[[], tuple[Tensor, DeepEPHandle]]:
        """Dispatch what was not dispatched before: x [N,H] bf16, weights [N,K] fp32."""
        num_tokens = x.shape[0]
        choices = choices.to(_package().topk_idx_t)
        if num_tokens == 0:  # no kernel is asked what it does without tokens: one goes nowhere
            x, weights = x.new_zeros(1, x.shape[1]), weights.new_zeros(1, weights.shape[1])
            choices = choices.new_full((1, choices.shape[1]), -1)
        operands = x.contiguous(), choices.contiguous(), weights.contiguous()
        finish = self.buffers.send(*operands, self.num_experts)

        def received() -> tuple[Tensor, DeepEPHandle]:
            x_r, choices_r, weights_r, counts, native = finish()
            return x_r, DeepEPHandle(choices_r.to(torch.int32), sum(counts), weights_r, dtype, num_tokens, native)

        return received

    def send_again(self, x: Tensor, handle: DeepEPHandle) -> Callable[[], Tensor]:
        """Dispatch other rows the same way: [N,H] -> [R,H], no wait on the host."""
        return self.buffers.send_again(x.contiguous() if x.shape[0] else x.new_zeros(1, x.shape[1]), handle.native)

    def sum_back(
        self, y: Tensor, handle: DeepEPHandle, weights: Tensor | None = None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Rows [R,H] and perhaps weights [R,K] back to their tokens, summed: [N,H] and [N,K]."""
        weights = None if weights is None else weights.contiguous()
        finish = self.buffers.sum_back(y.contiguous(), handle.native, weights)

        def summed() -> tuple[Tensor, Tensor | None]:
            x, of_weights = finish()
            return _first(x, handle.num_tokens), None if of_weights is None else _first(of_weights, handle.num_tokens)

        return summed


class _Transfer:
    """A dispatch, whose gradient is a combine of rows and of routing weights; see `halves.Transfer`."""

    needs: tuple[bool, bool] = False, False

    def __init__(self, transport: DeepEP, choices: Tensor, handle: DeepEPHandle | None, dtype: torch.dtype):
        self.transport, self.choices, self.known, self.dtype = transport, choices, handle, dtype
        self.finish: Any = None

    @property
    def handle(self) -> DeepEPHandle:
        """Of this dispatch, once it has arrived."""
        assert self.known is not None
        return self.known

    def launch(self, x: Tensor, weights: Tensor) -> None:
        if self.known is None:
            self.finish = self.transport.send(x, self.choices, weights, self.dtype)
        else:
            self.finish = self.transport.send_again(x, self.known)

    def arrive(self) -> tuple[Tensor, Tensor]:
        found = self._finished()
        x_r, self.known = found if self.known is None else (found, self.known)
        # Another tensor on the same memory: autograd marks what is returned, and the handle outlives the graph.
        return x_r, self.handle.weights.detach()

    def launch_back(self, x_grad: Tensor, weights_grad: Tensor) -> None:
        self.finish = self.transport.sum_back(x_grad, self.handle, weights_grad if self.needs[1] else None)

    def arrive_back(self) -> tuple[Tensor, Tensor | None]:
        return self._finished()

    def _finished(self) -> Any:
        finish, self.finish = self.finish, None
        return finish()


class _Combine(torch.autograd.Function):
    """Its gradient is a dispatch that repeats the first one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, transport: DeepEP, handle: DeepEPHandle, scale: float, keep: Any) -> Tensor:
        ctx.transport, ctx.handle, ctx.scale, ctx.keep = transport, handle, scale, keep
        return transport.sum_back(y, handle)()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = scaled(gradients[0], ctx.scale)
        return ctx.transport.send_again(gradient, ctx.handle)(), None, None, None, None


def _first(rows: Tensor, number: int) -> Tensor:
    """The first rows, no view: there are more where a rank without tokens sent one in their place."""
    return rows if len(rows) == number else rows[:number].clone()


def _as_bf16(rows: Tensor) -> Tensor:
    """Rows as DeepEP sends them; fp32 is rounded where autocast would round it for the experts, and nowhere else."""
    if rows.dtype == torch.bfloat16:
        return rows
    device = rows.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if rows.dtype != torch.float32 or not autocast:
        raise ConfigError(
            f"dispatcher=deepep sends bf16, and the hidden states are {str(rows.dtype).removeprefix('torch.')}",
            "mixed_precision: bf16, or dispatcher: alltoall",
        )
    return rows.to(torch.bfloat16)


# ---- one buffer a group, shared by all layers and models, and gone before its process group


_open: dict[Any, Buffer | Elastic] = {}


def _buffers(group: dist.ProcessGroup, kind: str) -> Any:
    before_groups_end(_close_unless_failing)
    if (group, kind) not in _open:
        _open[group, kind] = (Buffer if kind == "buffer" else Elastic)(group, _package())
    return _open[group, kind]


def close(group: Any = None) -> None:
    """Destroy the buffers of a group, or all; they come back when used again. A collective call."""
    for (of_group, _), buffers in _open.items():
        if group is None or of_group is group:
            buffers.close()


def _close_unless_failing(group: Any = None) -> None:
    """After an exception the other ranks may be anywhere: waiting for them would only hide it."""
    if sys.exc_info()[0] is None and getattr(sys, "last_value", None) is None:
        close(group)
        for key in [each for each in _open if group is None or each[0] is group]:
            del _open[key]


# ---- whether it can be used


@functools.cache
def _package() -> Any:
    return importlib.import_module("deep_ep")


def is_installed() -> bool:
    """Whether there is a package of this name."""
    return importlib.util.find_spec("deep_ep") is not None


def kind() -> str:
    """Which implementation is used: `buffer` or `elastic`."""
    return os.environ.get(ENV_VAR) or ("buffer" if hasattr(_package(), "Buffer") else "elastic")


def implementation() -> str:
    """Of the package in use, for people: its class and version."""
    version = getattr(_package(), "__version__", None)
    return f"deep_ep.{KINDS[kind()]}{f' {version}' if version else ''}"


def problem(device: torch.device) -> str | None:
    """Why this process cannot use DeepEP, whatever the model; None where it can."""
    if not is_installed():
        return "the package deep_ep is not installed"
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this process computes on {device.type}"
    try:
        package = _package()
    except (ImportError, OSError, AssertionError, RuntimeError) as error:  # 2.x asserts that NCCL is the one it wants
        return f"import deep_ep fails: {type(error).__name__}: {str(error).strip() or 'without a message'}"
    asked = os.environ.get(ENV_VAR)
    if asked and asked not in KINDS:
        return f"{ENV_VAR}={asked!r} must be one of {', '.join(KINDS)}"
    wanted = [KINDS[asked]] if asked else list(KINDS.values())
    if not any(hasattr(package, name) for name in wanted):
        others = [name for name in (*KINDS.values(), "EPBuffer", "HybridEPBuffer") if hasattr(package, name)]
        return f"deep_ep has no {' or '.join(wanted)}, only {', '.join(others) or 'other names'}"
    return _problem_of_gpu(device, package)


def _problem_of_gpu(device: torch.device, package: Any) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (9, 0) or (kind() == "buffer" and not package.Buffer.is_sm90_compiled()):
        return None
    return f"deep_ep is built for compute capability 9.0 and newer, and this GPU has {'.'.join(map(str, capability))}"
