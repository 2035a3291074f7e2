"""The fused loss, in plain torch: the cross-entropy of all logits, and its gradients."""

from functools import partial

import pytest
import torch

from moe_accel.kernels import cross_entropy
from tests.unit.noise import values

_values = partial(values, dtype=torch.float64)


CHUNKS = {"one-chunk": 1 << 30, "chunks-of-two-rows": 2 * 11 * 8, "chunks-of-one-row": 1}


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("divisor", [None, 7.0])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
def test_linear_cross_entropy_is_that_of_all_logits(chunk_bytes, divisor, frozen, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    hidden, weight = _values(5, 4).requires_grad_(frozen != "hidden"), _values(11, 4).requires_grad_(frozen != "weight")
    labels = torch.tensor([3, -100, 0, 10, 3])
    wanted = [each for each in (hidden, weight) if each.requires_grad]
    total = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum") / (divisor or 4)
    given = None if divisor is None else torch.tensor(divisor)
    found = cross_entropy.linear_cross_entropy(hidden, weight, labels, given)
    torch.testing.assert_close(found, total)
    for one, other in zip(torch.autograd.grad(3 * found, wanted), torch.autograd.grad(3 * total, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_computed_of_rows_that_do_not_count(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2 * 11 * 8)  # two rows
    hidden, weight = _values(7, 4), _values(11, 4).requires_grad_()
    labels = torch.tensor([-100, 3, 7, -100, 0, -100, -100])
    counts = labels != -100
    hidden[~counts] = float("nan")
    hidden.requires_grad_()
    found = torch.autograd.grad(cross_entropy.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    total = torch.nn.functional.cross_entropy(hidden[counts] @ weight.T, labels[counts])
    for one, other in zip(found, torch.autograd.grad(total, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_no_rows_still_give_every_parameter_a_gradient():
    hidden, weight = _values(0, 4).requires_grad_(), _values(11, 4).requires_grad_()
    found = cross_entropy.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), torch.tensor(3.0))
    of_hidden, of_weight = torch.autograd.grad(found, (hidden, weight))
    assert found == 0
    assert of_hidden.shape == (0, 4)
    assert torch.equal(of_weight, torch.zeros(11, 4, dtype=torch.float64))


def test_a_loss_of_no_counting_rows_is_that_of_torch():
    hidden, weight, labels = _values(5, 4).requires_grad_(), _values(11, 4).requires_grad_(), torch.full((5,), -100)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    found = cross_entropy.linear_cross_entropy(hidden, weight, labels)
    assert expected.isnan()
    assert found.isnan()
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
