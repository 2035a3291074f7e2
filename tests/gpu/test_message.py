"""What all-to-all prepares on a GPU: counts, order and tails of rows are those of torch, and twice the same bits.

run: pytest -m gpu tests/gpu
"""

import pytest
import torch

from moe_accel.dispatch import message, plan
from moe_accel.kernels.rows import RowMap, sum_copies, sum_torch
from moe_accel.kernels.sort import sort_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("skew", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_ranks", "num_local"),
    [
        (16_384, 8, 2, 64),
        (4096, 8, 8, 16),
        (4096, 8, 64, 2),
        (4096, 6, 4, 32),
        (777, 8, 8, 16),
        (1001, 3, 4, 2),
        (1, 1, 2, 1),
    ],
)
def test_message_is_that_of_torch(num_tokens, top_k, num_ranks, num_local, dtype, skew):
    generator = torch.Generator("cuda").manual_seed(num_tokens + num_ranks)
    uniform = torch.rand(num_tokens, top_k, device="cuda", generator=generator)
    choices = (uniform**skew * num_ranks * num_local).long()
    counted, expected = plan.count(choices, num_ranks, num_local), plan.count_torch(choices, num_ranks, num_local)
    assert all(map(torch.equal, counted, expected))
    assert all(map(torch.equal, counted, plan.count(choices, num_ranks, num_local)))
    num_rows = int(counted.counts[:, 0].sum())
    rows, ranks = plan.order(counted)
    truth = sort_torch(counted.ranks, num_ranks, num_tokens * min(num_ranks, top_k))
    rows, ranks = plan.cut(rows, num_rows), ranks[:num_rows]
    assert torch.equal(ranks.int(), truth.experts[:num_rows].int())
    assert all(map(torch.equal, rows[:3], plan.cut(RowMap(*truth[3:]), num_rows)[:3]))

    x = torch.randn(num_tokens, 2048, device="cuda", dtype=dtype, generator=generator)
    weights = torch.rand(num_tokens, top_k, device="cuda", generator=generator)
    packed, layout = message.pack(x, weights, choices, rows, ranks, num_local)
    written = packed.clone()
    message.write_torch(written, layout, weights, choices, rows.sources, ranks, num_local)
    for found, of_torch in zip(message.unpack(packed, layout), message.unpack(written, layout), strict=True):
        assert torch.equal(found, of_torch)
    x_s, weights_s, _ = message.unpack(packed, layout)
    assert torch.equal(x_s, x[rows.sources])
    assert torch.equal(weights_s, weights[rows.sources])
    found = sum_copies(x_s, rows)
    exact = sum_torch(x_s.double().contiguous(), rows.copies, rows.starts)
    assert float((found - exact).abs().max()) <= float(exact.abs().max()) * torch.finfo(dtype).eps

    both, layout = message.pack_gradients(x_s, weights_s)
    assert torch.equal(message.unpack(both, layout)[0], x_s)
    assert torch.equal(message.unpack(both, layout)[1], weights_s)
