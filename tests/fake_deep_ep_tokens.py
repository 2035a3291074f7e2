"""How the fake `deep_ep` moves tokens, and what both of its implementations check: see `fake_deep_ep.py`."""

from collections import Counter

import torch
import torch.distributed as dist

topk_idx_t = torch.int64

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


class Mover:
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

    def end(self, is_async, *results):
        event = Event(*results)
        if not is_async:
            event.happen()
        return EventOverlap(event if is_async else None)

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

    def both_back(self, rows, topk_weights, in_rank, counts):
        """Rows, and their weights if there are any."""
        combined, weights = self.back(rows, in_rank, counts), None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape[0] == rows.shape[0]
            weights = self.back(topk_weights, in_rank, counts)
        return combined, weights

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
