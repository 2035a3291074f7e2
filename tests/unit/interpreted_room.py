"""Kernels of rows with room for more, on Triton's interpreter: run by `test_kernels.py`."""

import pytest
import torch

from moe_accel.kernels import glu, more, rows, sort, squared_relu
from moe_accel.kernels.device import INTERPRETED
from tests import interpreter
from tests.unit.noise import EPSILON, values

assert INTERPRETED, "set TRITON_INTERPRET=1"
interpreter.read_bounds_of_loops()

ROOM, WIDTH = 7, 24


@pytest.mark.parametrize("count", [0, 1, 5, ROOM])
def test_copies_behind_the_stop_are_neither_summed_nor_gathered(count):
    copies = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    behind = torch.full((ROOM - count,), 10**6)  # nowhere
    starts = torch.tensor([0, count // 2, count])
    stop = torch.tensor([count], dtype=torch.int32)
    sources = torch.zeros(ROOM, dtype=torch.int64)
    sources[copies] = (torch.arange(count) >= count // 2).long()
    roomy = rows.RowMap(sources, torch.cat([copies, behind]), starts, stop=stop)
    x = values(ROOM, WIDTH)
    for other in (None, x.cos()):
        found = rows.sum_copies(x, roomy, other)
        expected = rows.sum_torch(x, copies, starts, other) if count else torch.zeros(3, WIDTH)
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * EPSILON)
    assert torch.equal(rows.gather(x[:3], roomy)[:count], x[:3][sources[:count]])


@pytest.mark.parametrize("count", [0, 3, ROOM])
@pytest.mark.parametrize(
    ("activation", "backward", "twice"),
    [(glu.glu, glu.glu_backward, 2), (squared_relu.squared_relu, squared_relu.squared_relu_backward, 1)],
    ids=["glu", "squared relu"],
)
def test_activations_write_nothing_behind_the_stop(activation, backward, twice, count, monkeypatch):
    u, gradient, weight = values(ROOM, twice * WIDTH), values(ROOM, WIDTH), values(ROOM)
    stop = torch.tensor([count], dtype=torch.int32)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **how: new_empty(self, *size, **how).fill_(7))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **how: empty_like(tensor, **how).fill_(7))
    found = [activation(u, weight, stop=stop), *backward(gradient, u, weight, stop=stop)]
    expected = [activation(u, weight), *backward(gradient, u, weight)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:count], other[:count])
        assert (one[count:] == 7).all()


@pytest.mark.parametrize("lowest", [-1, 0])
def test_sort_fills_what_is_behind_the_pairs(lowest):
    choices = torch.randint(lowest, 5, (40, 3), generator=torch.Generator().manual_seed(0)).int()
    found, expected = (each(choices, 5, 120, True) for each in (sort.sort_triton, sort.sort_torch))
    count = int((choices >= 0).sum())
    for name, one, other in zip(found._fields, found, expected, strict=True):
        end = count if name == "copies" else len(other)
        assert one.dtype == other.dtype, name
        assert torch.equal(one[:end], other[:end]), name
    assert (found.pairs[count:] == 120).all()


@pytest.mark.parametrize("count", [0, 2, ROOM - 1, ROOM])
def test_rows_behind_the_stop_are_cleared_some_of_them(count):
    given = values(ROOM, 1030)
    found, expected = given.clone(), given.clone()
    more.clear_behind(found, torch.tensor([count], dtype=torch.int32), 3)
    expected[count : count + 3] = 0
    assert torch.equal(found, expected)
