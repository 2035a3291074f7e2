"""A `deep_ep` that runs anywhere: the package's own signatures and rules, tokens moved by torch.distributed.

What it checks is what the real one would get wrong in silence or crash at: argument names, dtypes, contiguity, sizes of
the buffer, which arguments go with a handle, how `previous_event` may be used, calls after `destroy`, and `destroy`
without its process group. Results are NaN or -7 until their event was waited for, as on a stream that is not that far.
Read in deep_ep 1.2.1 and 2.1.0: `buffer.py`, `legacy/buffer.hpp`, `elastic.py`, `elastic/buffer.hpp`.
"""

import importlib.machinery
import sys
import types
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist

CALLS = Counter()
"""Calls by name, those with a handle apart."""

PENDING = []
"""Events that nobody has waited for."""

ALIVE = []
"""Buffers that are not destroyed."""


class Event:
    """Results that come when it is waited for; `capture` gives one without results."""

    def __init__(self, *results):
        self.results = [(each, each.clone()) for each in results if each is not None]
        for shown, _ in self.results:
            shown.fill_(float("nan") if shown.is_floating_point() else (False if shown.dtype == torch.bool else -7))
        PENDING.append(self)

    def happen(self):
        for shown, kept in self.results:
            shown.copy_(kept)
        self.results = []
        if self in PENDING:
            PENDING.remove(self)


class EventOverlap:
    def __init__(self, event):
        self.event = event

    def current_stream_wait(self):
        assert self.event is not None
        self.event.happen()


class Config:
    def __init__(self, what, num_sms):
        self.what, self.num_sms = what, num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return self.num_sms // 2 * num_ranks * 256 * (hidden_bytes + 2048)

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0 if num_ranks <= 8 else 1 << 20


def exchange(rows, send, receive, group):
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def check_rows(x, buffer_hidden):
    assert x.dim() == 2, x.shape
    assert x.is_contiguous()
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.shape[1] <= buffer_hidden, f"rows of {x.shape[1]} in a buffer for {buffer_hidden}"
    assert x.isfinite().all(), "rows that are not there yet"


class _Mover:
    """What both implementations do with tokens: rows ordered by source rank, then by token."""

    def join(self, group):
        assert isinstance(group, dist.ProcessGroup), group
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.destroyed = False
        ALIVE.append(self)

    def leave(self, explicitly_destroy):
        assert explicitly_destroy, "`explicitly_destroy` flag must be set"
        assert not self.destroyed
        assert not PENDING, "destroyed while somebody still has to wait"
        assert dist.is_initialized(), "destroyed after the process group"
        dist.barrier(self.group)  # as the real one waits for the other ranks
        self.destroyed = True
        ALIVE.remove(self)

    def layout_of(self, topk_idx, num_experts):
        assert num_experts % self.group_size == 0
        num_local = num_experts // self.group_size
        ranks = torch.where(topk_idx >= 0, topk_idx // num_local, -1)
        in_rank = torch.stack([(ranks == rank).any(1) for rank in range(self.group_size)], 1)
        per_expert = torch.stack([(topk_idx == expert).sum() for expert in range(num_experts)])
        return in_rank.sum(0).int(), per_expert.int(), in_rank

    def all_counts(self, per_rank):
        """[G,G] rows from each rank to each rank."""
        found = [torch.empty_like(per_rank) for _ in range(self.group_size)]
        dist.all_gather(found, per_rank, group=self.group)
        return torch.stack(found)

    def sources(self, in_rank):
        return torch.cat([in_rank[:, rank].nonzero()[:, 0] for rank in range(self.group_size)])

    def there(self, rows, in_rank, counts):
        return exchange(
            rows[self.sources(in_rank)], counts[self.rank].tolist(), counts[:, self.rank].tolist(), self.group
        )

    def back(self, rows, in_rank, counts):
        """Summed in fp32, rounded once."""
        sent_back = exchange(rows, counts[:, self.rank].tolist(), counts[self.rank].tolist(), self.group)
        total = torch.zeros(in_rank.shape[0], rows.shape[1])
        return total.index_add_(0, self.sources(in_rank), sent_back.float()).to(rows.dtype)

    def arrived(self, topk_idx, topk_weights, num_experts, in_rank, counts):
        idx, weights = (self.there(each, in_rank, counts) for each in (topk_idx, topk_weights))
        num_local = num_experts // self.group_size
        idx = idx - self.rank * num_local
        here = (idx >= 0) & (idx < num_local)
        idx = idx.where(here, -1)
        per_expert = [int((idx == expert).sum()) for expert in range(num_local)]
        return idx, weights.where(here, 0), per_expert

    def check_choices(self, topk_idx, topk_weights, num_tokens):
        assert topk_idx.dtype == topk_idx_t, topk_idx.dtype
        assert topk_weights.dtype == torch.float32, topk_weights.dtype
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_idx.shape == topk_weights.shape
        assert topk_idx.shape[0] == num_tokens
        assert topk_idx.shape[1] <= 32


class Buffer(_Mover):
    num_sms = 20

    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        use_fabric=False,
        explicitly_destroy=False,
        enable_shrink=False,
        comm=None,
    ):
        assert group.size() in (2, 4, 8), f"Unsupported ranks {group.size()}"
        assert (low_latency_mode, comm, num_rdma_bytes) == (False, None, 0)
        self.join(group)
        self.num_nvl_bytes, self.explicitly_destroy = num_nvl_bytes, explicitly_destroy
        CALLS["Buffer"] += 1

    @staticmethod
    def is_sm90_compiled():
        return True

    @staticmethod
    def capture():
        return EventOverlap(Event())

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        return Config("dispatch", Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        return Config("combine", Buffer.num_sms)

    def destroy(self):
        self.leave(self.explicitly_destroy)

    def begin(self, previous_event, async_finish, allocate_on_comm_stream):
        assert not self.destroyed, "a call after destroy()"
        if allocate_on_comm_stream:
            assert previous_event is not None
            assert async_finish
        if previous_event is not None:
            assert isinstance(previous_event, EventOverlap)
            assert previous_event.event is not None
            previous_event.event.happen()

    def end(self, async_finish, *results):
        event = Event(*results)
        if not async_finish:
            event.happen()
        return EventOverlap(event if async_finish else None)

    def room(self, config, hidden):
        needed = config.num_sms // 2 * self.group_size * 256 * hidden * 2
        assert needed <= self.num_nvl_bytes, f"{needed} bytes in a buffer of {self.num_nvl_bytes}"
        return hidden

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        CALLS["layout"] += 1
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        per_rank, per_expert, in_rank = self.layout_of(topk_idx, num_experts)
        return per_rank, None, per_expert, in_rank, self.end(async_finish, per_rank, per_expert, in_rank)

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        assert config.what == "dispatch"
        check_rows(x, self.room(config, x.shape[1]))
        if handle is not None:
            CALLS["dispatch with handle"] += 1
            assert topk_idx is None
            assert topk_weights is None
            assert type(handle) is tuple
            assert len(handle) == 6
            counts, in_rank = handle[0].diff(dim=0, prepend=handle[0].new_zeros(1, self.group_size)), handle[4]
            assert in_rank.shape == (x.shape[0], self.group_size)
            assert config.num_sms // 2 == handle[1].shape[1], "a handle of another number of SMs"
            recv_x = self.there(x, in_rank, counts)
            return recv_x, None, None, None, None, self.end(async_finish, recv_x)
        CALLS["dispatch"] += 1
        assert num_tokens_per_rdma_rank is None
        self.check_choices(topk_idx, topk_weights, x.shape[0])
        num_experts = num_tokens_per_expert.shape[0]
        for given, true in zip(
            (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank),
            self.layout_of(topk_idx, num_experts),
            strict=True,
        ):
            assert given.dtype == true.dtype, "not the layout of these choices"
            assert torch.equal(given, true), "not the layout of these choices"
        counts = self.all_counts(num_tokens_per_rank)
        recv_x = self.there(x, is_token_in_rank, counts)
        idx, weights, per_expert = self.arrived(topk_idx, topk_weights, num_experts, is_token_in_rank, counts)
        channels = torch.zeros(self.group_size, config.num_sms // 2, dtype=torch.int32)
        sources = torch.zeros(recv_x.shape[0], dtype=torch.int32)
        heads = torch.zeros(x.shape[0], self.group_size, dtype=torch.int32)
        made = counts.cumsum(0).int(), channels, channels.clone(), sources, is_token_in_rank, heads
        return recv_x, idx, weights, per_expert, made, self.end(async_finish, recv_x, idx, weights)

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.begin(previous_event, async_finish, allocate_on_comm_stream)
        CALLS["combine"] += 1
        assert config.what == "combine"
        assert bias is None
        check_rows(x, self.room(config, x.shape[1]))
        assert x.shape[0] == handle[3].shape[0], "rows of another dispatch"
        assert config.num_sms // 2 == handle[1].shape[1], "a handle of another number of SMs"
        counts, in_rank = handle[0].diff(dim=0, prepend=handle[0].new_zeros(1, self.group_size)), handle[4]
        combined, weights = self.back(x, in_rank, counts), None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape[0] == x.shape[0]
            weights = self.back(topk_weights, in_rank, counts)
        return combined, weights, self.end(async_finish, combined, weights)


class EPHandle:
    def __init__(self, topk_idx, num_experts, num_max_tokens_per_rank, num_sms, per_expert, in_rank, counts):
        self.topk_idx, self.num_experts, self.num_sms = topk_idx.clone(), num_experts, num_sms
        self.num_max_tokens_per_rank, self.num_recv_tokens_per_expert_list = num_max_tokens_per_rank, per_expert
        self.in_rank, self.counts = in_rank, counts


class ElasticBuffer(_Mover):
    def __init__(
        self,
        group,
        num_bytes=None,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=0,
        hidden=0,
        num_topk=0,
        use_fp8_dispatch=False,
        deterministic=False,
        allow_hybrid_mode=True,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        sl_idx=3,
        num_allocated_qps=0,
        num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100,
        explicitly_destroy=False,
    ):
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        self.join(group)
        self.room, self.explicitly_destroy = (num_max_tokens_per_rank, hidden, num_topk), explicitly_destroy
        agreed = [None] * self.group_size
        dist.all_gather_object(agreed, self.room, group=group)
        assert len(set(agreed)) == 1, f"ranks disagree about the size: {agreed}"
        CALLS["ElasticBuffer"] += 1

    @staticmethod
    def capture():
        return Event()

    def destroy(self):
        self.leave(self.explicitly_destroy)

    def begin(self, previous_event, allocate_on_comm_stream):
        assert not self.destroyed, "a call after destroy()"
        if previous_event is not None:
            assert isinstance(previous_event, Event), previous_event
            assert allocate_on_comm_stream
            previous_event.happen()

    def end(self, is_async, *results):
        event = Event(*results)
        if not is_async:
            event.happen()
        return EventOverlap(event if is_async else None)

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        cumulative_local_expert_recv_stats=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        expert_alignment=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
        handle=None,
        do_handle_copy=True,
        do_cpu_sync=None,
        do_expand=False,
        do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ):
        self.begin(previous_event, allocate_on_comm_stream)
        check_rows(x, self.room[1])
        assert x.shape[0] <= self.room[0]
        if handle is not None:
            CALLS["dispatch with handle"] += 1
            assert topk_idx is None
            assert topk_weights is None
            assert num_max_tokens_per_rank is None
            assert num_sms == handle.num_sms, "num_sms is worked out from num_experts, which is None with a handle"
            recv_x = self.there(x, handle.in_rank, handle.counts)
            return recv_x, None, None, handle, self.end(async_with_compute_stream, recv_x)
        CALLS["dispatch"] += 1
        assert num_max_tokens_per_rank == self.room[0]
        self.check_choices(topk_idx, topk_weights, x.shape[0])
        per_rank, _, in_rank = self.layout_of(topk_idx, num_experts)
        counts = self.all_counts(per_rank)
        recv_x = self.there(x, in_rank, counts)
        idx, weights, per_expert = self.arrived(topk_idx, topk_weights, num_experts, in_rank, counts)
        made = EPHandle(topk_idx, num_experts, num_max_tokens_per_rank, 12, per_expert, in_rank, counts)
        return recv_x, idx, weights, made, self.end(async_with_compute_stream, recv_x, idx, weights)

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    ):
        self.begin(previous_event, allocate_on_comm_stream)
        CALLS["combine"] += 1
        check_rows(x, self.room[1])
        assert x.shape[0] == int(handle.counts[:, self.rank].sum()), "rows of another dispatch"
        combined, weights = self.back(x, handle.in_rank, handle.counts), None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            weights = self.back(topk_weights, handle.in_rank, handle.counts)
        return combined, weights, self.end(async_with_compute_stream, combined, weights)


topk_idx_t = torch.int64


def make(*names):
    """A module `deep_ep` with these classes."""
    module = types.ModuleType("deep_ep")
    module.__spec__ = importlib.machinery.ModuleSpec("deep_ep", None)
    module.topk_idx_t, module.EventOverlap = topk_idx_t, EventOverlap
    for name in names:
        setattr(module, name, globals()[name])
    return module


def install(*names):
    """Let `import deep_ep` give the fake, here, and let it be used on CPUs: the rest of detection stays as it is."""
    from moe_accel.dispatch import deepep, topology

    CALLS.clear()
    sys.modules["deep_ep"] = make(*names)
    deepep._package.cache_clear()
    real = deepep.problem
    mock.patch.object(deepep, "problem", lambda device: None if device.type == "cpu" else real(device)).start()
    mock.patch.object(topology, "places", places).start()


def places(group, device):
    """One host, a GPU for each rank, and NVML says NVLink."""
    from moe_accel.dispatch import topology

    mock.patch.object(topology, "link", return_value="NVLink").start()
    return [topology.Place("host", f"GPU-{rank}", rank) for rank in range(dist.get_world_size(group))]
