"""What all-to-all sends and gets back, by the kernels on Triton's interpreter, is what torch makes of it: run by
`test_kernels.py`.
"""

from contextlib import nullcontext

import pytest
import torch

from moe_accel.dispatch import message, plan
from moe_accel.kernels import rows, sort
from moe_accel.kernels.device import INTERPRETED
from tests import interpreter
from tests.unit.noise import EPSILON, chosen, values

assert INTERPRETED, "set TRITON_INTERPRET=1"
interpreter.read_bounds_of_loops()


SENT = {
    "one": (1, 1, 2, 1),
    "few": (5, 3, 2, 4),
    "many": (150, 8, 8, 16),
    "odd": (70, 6, 3, 5),
    "of 40": (33, 4, 40, 2),
}
"""Tokens, top-k, ranks, experts of each."""


@pytest.mark.parametrize("of", SENT)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_sent_and_in_which_order(of, dtype):
    num_tokens, top_k, num_ranks, num_local = SENT[of]
    choices = chosen(num_tokens, top_k, num_ranks * num_local, skew=2).to(dtype)
    found, expected = (each(choices, num_ranks, num_local) for each in (plan.count, plan.count_torch))
    expected = expected._replace(blocks=plan.blocks_torch(expected.ranks, num_ranks))
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(map(torch.equal, found, expected))
    num_rows, most = int(found.counts[:, 0].sum()), num_tokens * min(num_ranks, top_k)
    (ours, ranks, ends), truth = plan.order(found), sort.sort_torch(expected.ranks, num_ranks, most)
    assert torch.equal(ends, truth.ends)
    assert torch.equal(ranks[:num_rows].int(), truth.experts[:num_rows].int())
    assert all(torch.equal(one[:num_rows], other[:num_rows]) for one, other in zip(ours[:2], truth[3:5], strict=True))
    assert torch.equal(ours.starts, truth.starts)
    row_ranks = [row for row in range(num_ranks) for _ in range(int(found.counts[row, 0]))]
    assert ranks[:num_rows].tolist() == row_ranks
    for row, (source, rank) in enumerate(zip(ours.sources[:num_rows].tolist(), row_ranks, strict=True)):
        assert rank in (choices[source] // num_local).tolist(), row


def test_a_count_that_is_compiled_wrong_is_noticed_and_not_used(monkeypatch):
    by_kernel = plan.count_triton
    sizes = iter([(11, 7), (11, 8), (11, 9)])  # that no other test has: what is right is remembered
    for wrong in range(3):

        def compiled(*given, wrong=wrong):
            return tuple(each.roll(1, 0) if at == wrong else each for at, each in enumerate(by_kernel(*given)))

        monkeypatch.setattr(plan, "count_triton", compiled)
        num_ranks, num_local = next(sizes)
        choices = chosen(9, 3, num_ranks * num_local, skew=1)
        for warns in (pytest.warns(RuntimeWarning, match="of 11 ranks and top 3"), nullcontext()):
            with warns:
                found = plan.count(choices, num_ranks, num_local)
            assert all(map(torch.equal, found[:2], plan.count_torch(choices, num_ranks, num_local)))
            assert found.blocks is None


@pytest.mark.parametrize("of", SENT)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_choices", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_travels_behind_a_row(of, weights_dtype, has_choices, ahead):
    num_tokens, top_k, num_ranks, num_local = SENT[of]
    choices = chosen(num_tokens, top_k, num_ranks * num_local, skew=2)
    counted = plan.count(choices, num_ranks, num_local)
    ordered, num_rows = plan.order(counted), int(counted.counts[:, 0].sum())
    where, ranks, _ = plan.cut(ordered, num_rows)
    x, weights = values(num_tokens, 16)[:, :12], values(num_tokens, top_k).to(weights_dtype)
    given = choices if has_choices else None
    packs_ahead = message.packs_ahead(x, weights)
    assert packs_ahead is (top_k * weights.element_size() % 4 == 0)
    ordered = ordered if ahead and packs_ahead else plan.cut(ordered, num_rows)
    packed, layout = message.pack(x, weights, given, ordered, num_local)
    packed = packed[:num_rows]
    assert packed.shape[1] % 16 == 0
    written = torch.zeros_like(packed)
    written[:, :12] = x[where.sources]
    message.write_torch(written, layout, weights, given, where.sources, ranks, num_local)
    assert torch.equal(packed[:, :12], written[:, :12])
    found, expected = message.unpack(packed, layout), message.unpack_torch(written, layout)
    assert torch.equal(found[0], x[where.sources])
    assert torch.equal(found[1], weights[where.sources])
    assert torch.equal(expected[0], found[1])
    assert (found[2] is None) is not has_choices
    if has_choices:
        assert torch.equal(found[2], expected[1])
        whose = found[2] + (ranks.long() * num_local)[:, None]
        assert torch.equal(whose[found[2] >= 0], choices[where.sources][found[2] >= 0])
        assert int((found[2] >= 0).sum()) == choices.numel()


@pytest.mark.parametrize("of", SENT)
@pytest.mark.parametrize(("dtype", "weights_dtype"), [(torch.float32, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("width", [12, 1030])
def test_gradients_that_come_home(of, dtype, weights_dtype, width):
    num_tokens, top_k, num_ranks, num_local = SENT[of]
    counted = plan.count(chosen(num_tokens, top_k, num_ranks * num_local, skew=2), num_ranks, num_local)
    num_rows = int(counted.counts[:, 0].sum())
    of_token = plan.cut(plan.order(counted), num_rows).rows
    x_grad, weights_grad = values(num_rows, width).to(dtype), values(num_rows, top_k).cos().to(weights_dtype)
    packed, layout = message.pack_gradients(x_grad, weights_grad)
    assert torch.equal(packed[:, :width], x_grad)
    assert torch.equal(message.unpack_torch(packed, layout)[0], weights_grad)
    found = message.sum_gradients(packed, layout, of_token, 0.25)
    for one, rows_ in zip(found, (x_grad, weights_grad), strict=True):
        expected = rows.sum_torch(rows_.double(), of_token.copies, of_token.starts) / 4
        assert one.dtype == rows_.dtype
        torch.testing.assert_close(one.double(), expected, rtol=4 * torch.finfo(rows_.dtype).eps, atol=4 * EPSILON)
