"""Gathering and summing rows are each other's transpose; the grouped GEMM is one product per group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_accel.kernels.grouped import grouped_mm, grouped_mm_by_group, takes_torch_grouped_mm
from moe_accel.kernels.rows import RowMap, gather_rows, sum_rows

COLUMNS = 3

MAPS = {
    "several-copies": (4, [2, 0, 2, 1, 0, 2, 3]),
    "rows-without-copies": (6, [4, 1, 4]),
    "one-row-takes-all": (3, [1] * 5),
    "identity": (4, [0, 1, 2, 3]),
    "no-copies": (4, []),
    "no-rows": (0, []),
}


def row_map(num_rows, sources):
    """The `RowMap` in which copy p comes from row sources[p], by counting."""
    copies = [p for row in range(num_rows) for p, source in enumerate(sources) if source == row]
    starts = [sum(source < row for source in sources) for row in range(num_rows)]
    return RowMap(*(torch.tensor(each, dtype=torch.int64) for each in (sources, copies, starts)))


def matrix(num_rows, sources):
    """[P,N] of zeros and ones: `gather_rows` is this matrix from the left, `sum_rows` its transpose."""
    return torch.eye(num_rows, dtype=torch.float64)[torch.tensor(sources, dtype=torch.int64)]


def values(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_rows", "sources"), MAPS.values(), ids=MAPS)
def test_gather_copies_and_sum_adds_the_copies(num_rows, sources):
    rows, gathers = row_map(num_rows, sources), matrix(num_rows, sources)
    x, y = values(num_rows, COLUMNS), values(len(sources), COLUMNS)
    assert torch.equal(gather_rows(x, rows), gathers @ x)
    # sums of at most 5 values near 1: 5 roundings
    torch.testing.assert_close(sum_rows(y, rows), gathers.T @ y, rtol=0, atol=10 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(("num_rows", "sources"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("function", [gather_rows, sum_rows])
def test_each_has_the_gradient_that_finite_differences_give(function, num_rows, sources):
    rows = row_map(num_rows, sources)
    given_rows = num_rows if function is gather_rows else len(sources)
    x = values(given_rows, COLUMNS).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, rows), x)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=12))))
def test_each_ones_backward_is_the_others_forward(case):
    num_rows, sources = case
    rows = row_map(num_rows, sources)
    x = values(num_rows, COLUMNS).requires_grad_()
    y = values(len(sources), COLUMNS).requires_grad_()
    gather_rows(x, rows).backward(y.detach())
    sum_rows(y, rows).backward(x.detach())
    assert torch.equal(x.grad, sum_rows(y.detach(), rows))
    assert torch.equal(y.grad, gather_rows(x.detach(), rows))


@pytest.mark.parametrize("gradient", [False, True], ids=["sum_rows", "gradient-of-gather_rows"])
def test_bf16_is_summed_in_fp32(gradient):
    """512 times 1: a bf16 accumulator has 8 bits and stops at 256."""
    num_copies = 512
    rows = row_map(1, [0] * num_copies)
    ones = torch.ones(num_copies, COLUMNS, dtype=torch.bfloat16)
    if gradient:
        x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
        gather_rows(x, rows).backward(ones)
        total = x.grad
    else:
        total = sum_rows(ones, rows)
    assert total.dtype == torch.bfloat16
    assert torch.equal(total, torch.full((1, COLUMNS), float(num_copies), dtype=torch.bfloat16))


def test_a_strided_gradient_is_summed_as_its_values_are():
    rows = row_map(3, [2, 0, 2])
    x = torch.zeros(3, COLUMNS, dtype=torch.float64, requires_grad=True)
    gather_rows(x, rows).sum().backward()  # the gradient of a sum is one expanded number
    assert x.grad.tolist() == [[1.0] * COLUMNS, [0.0] * COLUMNS, [2.0] * COLUMNS]


# ---- the grouped GEMM

GROUPS = {
    "even": [2, 2, 2],
    "uneven": [1, 5, 3],
    "empty-first": [0, 3, 1],
    "empty-middle": [3, 0, 1],
    "empty-last": [3, 1, 0],
    "all-in-one": [0, 6, 0],
    "all-empty": [0, 0, 0],
}


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed-view"])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_grouped_mm_is_the_product_of_each_row_with_its_groups_matrix(sizes, transposed):
    rows = values(sum(sizes), 4).requires_grad_()
    stored = values(3, 5, 4) if transposed else values(3, 4, 5)
    matrices = stored.transpose(1, 2) if transposed else stored
    matrices.requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).int()
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))

    product = grouped_mm(rows, matrices, ends)
    truth = torch.einsum("pa,pab->pb", rows, matrices[group])
    # dot products of 4 values, gradients of at most 6
    close = {"rtol": 0, "atol": 40 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(product, truth, **close)
    upstream = values(*truth.shape)
    ours = torch.autograd.grad(product, (rows, matrices), upstream)
    theirs = torch.autograd.grad(truth, (rows, matrices), upstream)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, **close)
    assert ours[1][torch.tensor(sizes) == 0].count_nonzero() == 0


def test_without_a_gpu_the_grouped_mm_is_its_twin():
    rows, matrices, ends = torch.ones(2, 8).bfloat16(), torch.ones(1, 8, 8).bfloat16(), torch.tensor([2]).int()
    assert not takes_torch_grouped_mm(rows, matrices)
    assert torch.equal(grouped_mm(rows, matrices, ends), grouped_mm_by_group(rows, matrices, ends))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_two", [False, True])
def test_sums_of_16_bit_rows_are_rounded_once(dtype, of_two):
    rows = row_map(6, [0] * 9 + [3, 5] * 8)
    y = values(25, COLUMNS, dtype=torch.float32).to(dtype)
    more = y.cos() if of_two else None
    exact = sum_rows(y.double(), rows, None if more is None else more.double())
    assert torch.equal(sum_rows(y, rows, more), exact.to(dtype))
