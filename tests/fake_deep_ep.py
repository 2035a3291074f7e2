"""A `deep_ep` that runs anywhere: the package's own signatures and rules, tokens moved by torch.distributed.

What it checks is what the real one would get wrong in silence or crash at: argument names, dtypes, contiguity, sizes of
the buffer, which arguments go with a handle, how `previous_event` may be used, calls after `destroy`, and `destroy`
without its process group. Results are NaN or -7 until their event was waited for, as on a stream that is not that far.
Read in deep_ep 1.2.1 and 2.1.0: `buffer.py`, `legacy/buffer.hpp`, `elastic.py`, `elastic/buffer.hpp`.
"""

import importlib.machinery
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist

from tests.fake_deep_ep_tokens import ALIVE, CALLS, PENDING, Config, Event, EventOverlap, Mover, check_rows, topk_idx_t

__all__ = ["ALIVE", "CALLS", "PENDING", "Buffer", "ElasticBuffer", "install", "make"]


class Buffer(Mover):
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
        combined, weights = self.both_back(x, topk_weights, in_rank, counts)
        return combined, weights, self.end(async_finish, combined, weights)


class EPHandle:
    def __init__(self, topk_idx, num_experts, num_max_tokens_per_rank, num_sms, per_expert, in_rank, counts):
        self.topk_idx, self.num_experts, self.num_sms = topk_idx.clone(), num_experts, num_sms
        self.num_max_tokens_per_rank, self.num_recv_tokens_per_expert_list = num_max_tokens_per_rank, per_expert
        self.in_rank, self.counts = in_rank, counts


class ElasticBuffer(Mover):
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
        combined, weights = self.both_back(x, topk_weights, handle.in_rank, handle.counts)
        return combined, weights, self.end(async_with_compute_stream, combined, weights)


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
