"""Sorting (row, choice) pairs by expert, against a twin that sorts Python lists.

Sizes: R rows, K top-k, e local experts, P pairs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels.rows import gather_rows, sum_rows


def assert_sorted(choices, num_experts, routing):
    """The routing of `choices` (R lists of K experts, -1 for not here) is that of the twin, in each of its tensors."""
    top_k = len(choices[0]) if choices else 1
    flat = [expert for row in choices for expert in row]
    pairs = sorted((pair for pair, expert in enumerate(flat) if expert >= 0), key=lambda pair: flat[pair])
    assert routing.pairs.tolist() == pairs
    assert routing.experts.tolist() == [flat[pair] for pair in pairs]
    assert routing.ends.tolist() == [sum(0 <= chosen <= expert for chosen in flat) for expert in range(num_experts)]
    assert routing.ends.dtype == torch.int32
    assert routing.counts().tolist() == [flat.count(expert) for expert in range(num_experts)]
    assert routing.counts().dtype == torch.int64

    sources = [pair // top_k for pair in pairs]
    assert routing.rows.sources.tolist() == sources
    num_copies = [sources.count(row) for row in range(len(choices))]
    assert routing.rows.starts.tolist() == [sum(num_copies[:row]) for row in range(len(choices))]
    for row, start in enumerate(routing.rows.starts.tolist()):
        copies = routing.rows.copies.tolist()[start : start + num_copies[row]]
        assert sorted(copies) == [at for at, source in enumerate(sources) if source == row]


def as_tensor(choices, dtype=torch.int64):
    return torch.tensor(choices, dtype=dtype).reshape(len(choices), len(choices[0]) if choices else 1)


def table(lowest):
    """Strategy: choices [R,K] among e experts, from `lowest` on, and e."""

    def rows(sizes):
        num_rows, top_k, num_experts = sizes
        row = st.lists(st.integers(lowest, num_experts - 1), min_size=top_k, max_size=top_k)
        return st.tuples(st.lists(row, min_size=num_rows, max_size=num_rows), st.just(num_experts))

    return st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6)).flatmap(rows)


@settings(max_examples=150, deadline=None)
@given(table(lowest=0))
def test_all_pairs_are_sorted_where_every_expert_is_here(case):
    choices, num_experts = case
    assert_sorted(choices, num_experts, sort_by_expert(as_tensor(choices), num_experts))


@settings(max_examples=150, deadline=None)
@given(table(lowest=-1), st.sampled_from([torch.int32, torch.int64]))
def test_the_local_pairs_are_sorted_where_some_experts_are_elsewhere(case, dtype):
    choices, num_experts = case
    num_pairs = sum(expert >= 0 for row in choices for expert in row)
    assert_sorted(choices, num_experts, sort_by_expert(as_tensor(choices, dtype), num_experts, num_pairs))


@pytest.mark.parametrize("num_experts", [2**15 - 1, 2**15, 2**15 + 1])
def test_keys_are_wide_enough_for_any_number_of_experts(num_experts):
    """int16 up to 2**15 - 1 experts, where the mark for "not here" is the largest int16."""
    choices = as_tensor([[num_experts - 1, 0], [-1, num_experts - 2]])
    routing = sort_by_expert(choices, num_experts, 3)
    assert routing.pairs.tolist() == [1, 3, 0]
    assert routing.experts.tolist() == [0, num_experts - 2, num_experts - 1]
    assert routing.ends[[0, -3, -2, -1]].tolist() == [1, 1, 2, 3]


def test_pairs_of_an_expert_keep_the_order_of_their_rows():
    assert sort_by_expert(torch.tensor([[1, 0], [1, 0], [0, 1]]), 2).pairs.tolist() == [1, 3, 4, 0, 2, 5]


@settings(max_examples=60, deadline=None)
@given(table(lowest=-1))
def test_its_row_map_gathers_each_pairs_row_and_sums_a_rows_pairs(case):
    """What makes `sum_rows` the transpose of `gather_rows`: see `test_rows`."""
    choices, num_experts = case
    num_here = [sum(expert >= 0 for expert in row) for row in choices]
    routing = sort_by_expert(as_tensor(choices), num_experts, sum(num_here))
    x = torch.arange(len(choices), dtype=torch.float64)[:, None] + 1
    gathered = gather_rows(x, routing.rows)
    assert torch.equal(gathered, x[routing.rows.sources])
    assert torch.equal(sum_rows(gathered, routing.rows), x * torch.tensor(num_here, dtype=torch.float64)[:, None])
