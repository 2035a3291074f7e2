"""The two implementations of DeepEP behind one set of calls: `Buffer`, and `ElasticBuffer` of 2.x.

Each call starts on DeepEP's own stream, after what the current stream has been given so far and beside what it is given
next, and returns a function that lets the current stream wait for the result and gives it. What is sent is kept alive
until then.

Sizes: N tokens of this rank, R rows received, H hidden, K top-k.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Received = tuple[Tensor, Tensor, Tensor, list[int], Any]
"""x [R,H], choices [R,K], weights [R,K], rows of each expert of this rank, and DeepEP's handle."""


class Buffer:
    """`deep_ep.Buffer`. Its handles hold tensors only, and so outlive a buffer that is replaced by a larger one."""

    def __init__(self, group: dist.ProcessGroup, package: Any):
        self.group, self.package, self.hidden = group, package, 0
        self.native: Any = None

    def make_room(self, num_tokens: int, hidden: int, top_k: int) -> None:
        """Its size depends on H alone: tokens go through in chunks."""
        if hidden <= self.hidden:
            return
        self.close()
        buffer, num_ranks, row_bytes = self.package.Buffer, self.group.size(), hidden * 2
        # Kept: `Buffer.set_num_sms` changes what these calls return, and a handle fits one number of SMs.
        self.how_to_send, self.how_to_sum = buffer.get_dispatch_config(num_ranks), buffer.get_combine_config(num_ranks)
        configs = self.how_to_send, self.how_to_sum
        nvlink_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, num_ranks) for config in configs)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, num_ranks) for config in configs)
        self.native = buffer(self.group, nvlink_bytes, rdma_bytes, explicitly_destroy=True)
        self.hidden = hidden

    def send(self, x: Tensor, choices: Tensor, weights: Tensor, num_experts: int) -> Callable[[], Received]:
        """The layout is on its way afterwards; counts, for which the host waits, and rows come with the result."""
        self.make_room(x.shape[0], x.shape[1], choices.shape[1])
        layout = self.native.get_dispatch_layout(choices, num_experts, **self._after(self.native.capture()))
        per_rank, per_node, per_expert, in_rank, event = layout

        def received() -> Received:
            x_r, choices_r, weights_r, counts, native, arrived = self.native.dispatch(
                x,
                topk_idx=choices,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                config=self.how_to_send,
                **self._after(event),
            )
            arrived.current_stream_wait()
            return x_r, choices_r, weights_r, counts, native

        return received

    def send_again(self, x: Tensor, native: Any) -> Callable[[], Tensor]:
        """Send rows as a handle says: [N,H] -> [R,H]; no wait on the host."""
        how = self._after(self.native.capture())
        x_r, *_, event = self.native.dispatch(x, handle=native, config=self.how_to_send, **how)
        return _awaiting(event, x_r, x)

    def sum_back(self, y: Tensor, native: Any, weights: Tensor | None) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Sum rows [R,H], and perhaps weights [R,K], by token."""
        how = self._after(self.native.capture())
        summed_x, summed, event = self.native.combine(y, native, topk_weights=weights, config=self.how_to_sum, **how)
        return _awaiting(event, (summed_x, summed), y, weights)

    def close(self) -> None:
        """Destroy the buffer; the next call makes another."""
        if self.native is not None:
            self.native.destroy()
        self.native, self.hidden = None, 0

    @staticmethod
    def _after(event: Any) -> dict[str, Any]:
        """Start on DeepEP's stream once `event` has happened, and let this stream wait for no more than the result."""
        return {"previous_event": event, "async_finish": True, "allocate_on_comm_stream": True}


class Elastic:
    """`deep_ep.ElasticBuffer`, which has to know the most tokens of a rank: they are asked for, once a dispatch."""

    def __init__(self, group: dist.ProcessGroup, package: Any):
        self.group, self.package, self.room = group, package, (0, 0, 0)
        self.native: Any = None

    def make_room(self, num_tokens: int, hidden: int, top_k: int) -> None:
        """Room for the next power of two of tokens: kernels are compiled for a size, so it should change rarely."""
        wanted = max(128, 1 << (num_tokens - 1).bit_length()), hidden, top_k
        if self.native is not None and all(want <= have for want, have in zip(wanted, self.room, strict=True)):
            return
        self.close()
        self.room = tuple(max(pair) for pair in zip(wanted, self.room, strict=True))
        num_tokens, hidden, top_k = self.room
        self.native = self.package.ElasticBuffer(
            self.group,
            num_max_tokens_per_rank=num_tokens,
            hidden=hidden,
            num_topk=top_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            explicitly_destroy=True,
        )

    def send(self, x: Tensor, choices: Tensor, weights: Tensor, num_experts: int) -> Callable[[], Received]:
        """Nothing is sent before the result is asked for: counts, for which the host waits, come with the rows."""
        most = torch.tensor([x.shape[0]], device=x.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        self.make_room(int(most), x.shape[1], choices.shape[1])
        room, now = self.room[0], self._now()

        def received() -> Received:
            x_r, choices_r, weights_r, native, arrived = self.native.dispatch(
                x,
                topk_idx=choices,
                topk_weights=weights,
                num_experts=num_experts,
                num_max_tokens_per_rank=room,
                **now,
            )
            arrived.current_stream_wait()
            return x_r, choices_r, weights_r, native.num_recv_tokens_per_expert_list, native

        return received

    def send_again(self, x: Tensor, native: Any) -> Callable[[], Tensor]:
        """Send rows as a handle says: [N,H] -> [R,H]; no wait on the host."""
        # without num_sms it would be worked out from num_experts, which a repeated dispatch is not given
        x_r, *_, event = self.native.dispatch(x, handle=native, num_sms=native.num_sms, **self._now())
        return _awaiting(event, x_r, x)

    def sum_back(self, y: Tensor, native: Any, weights: Tensor | None) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Sum rows [R,H], and perhaps weights [R,K], by token."""
        summed_x, summed, event = self.native.combine(y, native, topk_weights=weights, **self._now())
        return _awaiting(event, (summed_x, summed), y, weights)

    def close(self) -> None:
        """Destroy the buffer; the next call makes another."""
        if self.native is not None:
            self.native.destroy()
        self.native = None

    def _now(self) -> dict[str, Any]:
        how = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
        return {"previous_event": self.native.capture(), **how}


def _awaiting(event: Any, result: Any, *sent: Tensor | None) -> Callable[[], Any]:
    """The function that waits; what was sent stays alive until then, though the current stream may go on to free it."""

    def awaited(sent: Any = sent) -> Any:
        event.current_stream_wait()
        return result

    return awaited
