"""What all-to-all prepares on a GPU: counts, order and tails of rows are those of torch, and twice the same bits.

run: pytest -m gpu tests/gpu
"""

import pytest
import torch

from moe_accel.dispatch import message, plan
from moe_accel.kernels.rows import gather, sum_torch
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
    sizes = num_ranks, num_local
    counted, expected = plan.count(choices, *sizes), plan.count_torch(choices, *sizes)
    expected = expected._replace(blocks=plan.blocks_torch(expected.ranks, num_ranks))
    assert all(map(torch.equal, counted, expected))
    assert all(map(torch.equal, counted, plan.count(choices, *sizes)))
    num_rows = int(counted.counts[:, 0].sum())
    ordered = plan.order(counted)
    truth = sort_torch(counted.ranks, num_ranks, num_tokens * min(num_ranks, top_k))
    of_token, ranks, ends = plan.cut(ordered, num_rows)
    assert torch.equal(ends, truth.ends)
    assert torch.equal(ranks.int(), truth.experts[:num_rows].int())
    assert torch.equal(of_token.sources, truth.sources[:num_rows])
    assert torch.equal(of_token.copies, truth.copies[:num_rows])
    assert torch.equal(of_token.starts, truth.starts)

    x = torch.randn(num_tokens, 2048, device="cuda", dtype=dtype, generator=generator)
    weights = torch.rand(num_tokens, top_k, device="cuda", generator=generator)
    packed, layout = message.pack(x, weights, choices, ordered, num_local)  # with room for more, as in training
    packed = packed[:num_rows]
    written = torch.zeros_like(packed)
    written[:, :2048] = x[of_token.sources]
    message.write_torch(written, layout, weights, choices, of_token.sources, ranks, num_local)
    used = 2048 * x.itemsize + 8 * top_k
    assert torch.equal(packed.view(torch.uint8)[:, :used], written.view(torch.uint8)[:, :used])
    x_s, weights_s, choices_s = message.unpack(packed, layout)
    assert torch.equal(x_s, x[of_token.sources])
    assert all(map(torch.equal, (weights_s, choices_s), message.unpack_torch(written, layout)))
    again, _ = message.pack(x, weights, None, plan.cut(ordered, num_rows), num_local)
    assert torch.equal(again[:, :2048], x_s)

    both, layout = message.pack_gradients(x_s, weights_s)
    assert torch.equal(both[:, :2048], x_s)
    assert torch.equal(message.unpack(both, layout)[1], weights_s)
    scale = num_ranks / 3
    for found, rows in zip(message.sum_gradients(both, layout, of_token, scale), (x_s, weights_s), strict=True):
        exact = sum_torch(rows.double().contiguous(), of_token.copies, of_token.starts) * scale
        error = torch.finfo(rows.dtype).eps + 8 * torch.finfo(torch.float32).eps  # of rounding, and of summing
        assert float((found - exact).abs().max()) <= float(exact.abs().max()) * error
    found = gather(x, of_token, scale=scale)
    assert torch.equal(found, (x.float() * scale).to(dtype)[of_token.sources])
