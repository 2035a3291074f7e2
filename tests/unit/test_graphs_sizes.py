"""Room for more tokens than a call has: what is put there, what is taken, and which calls fit."""

import pytest
import torch

from moe_accel.graphs.calls import Unusual, given
from moe_accel.graphs.sizes import STEP, Capacity, by_token


def called(*shapes, **kwargs):
    return given("cpu", tuple(torch.ones(each) for each in shapes), kwargs)


def test_capacities_are_multiples():
    assert [Capacity(most, "cpu").most for most in (1, STEP, STEP + 1)] == [STEP, STEP, 2 * STEP]


def test_fewer_tokens_come_first_and_what_was_behind_them_is_gone():
    sizes = Capacity(STEP, "cpu")
    room = torch.full((1, STEP, 3), torch.nan)
    tokens = torch.arange(30.0).view(2, 5, 3)
    sizes.begin([tokens])
    sizes.fill([room], [tokens])
    assert room[0, :10].equal(tokens.view(10, 3))
    assert not room[0, 10:].any()
    assert sizes.behind[:, 0].tolist() == [False] * 10 + [True] * (STEP - 10)
    (cut,) = sizes.cut([room])
    assert cut.equal(tokens)
    more = torch.ones(1, 12, 3)
    sizes.begin([more])
    assert sizes.behind[:, 0].tolist() == [False] * 12 + [True] * (STEP - 12)


def test_gradients_that_are_not_in_order_of_memory_are_put_in_order():
    sizes, room = Capacity(STEP, "cpu"), torch.empty(1, STEP, 3)
    gradient = torch.ones(()).expand(2, 5, 3) * torch.arange(3.0).view(3, 1).t()
    turned = torch.arange(30.0).view(5, 2, 3).transpose(0, 1)
    for each in (gradient, turned, torch.ones(()).expand(2, 5, 3)):
        sizes.begin([each])
        sizes.fill([room], [each])
        assert room[0, :10].equal(each.reshape(10, 3))


def test_outputs_of_each_token_may_have_one_dimension_less():
    sizes = Capacity(STEP, "cpu")
    sizes.begin([torch.ones(2, 5, 3)])
    found = sizes.cut([torch.arange(1.0 * STEP), torch.ones(1, STEP, 4), None])
    assert found[0].equal(torch.arange(10.0))
    assert found[1].shape == (2, 5, 4)
    assert found[2] is None


@pytest.mark.parametrize("made", [torch.ones(()), torch.ones(4, STEP), (torch.ones(1, STEP, 3), 7)])
def test_what_is_not_of_each_token_is_refused(made):
    with pytest.raises(Unusual):
        Capacity(STEP, "cpu").check(made)


def test_all_tokens_and_nothing_are_not():
    Capacity(STEP, "cpu").check((torch.ones(1, STEP, 3), [torch.ones(STEP), None]))


def test_calls_fit_that_are_alike_but_for_their_tokens():
    sizes, kind = Capacity(STEP, "cpu"), by_token(called((2, 5, 3), more=True))
    assert sizes.takes(kind, called((1, STEP, 3), more=True))
    assert not sizes.takes(kind, called((1, STEP + 1, 3), more=True))
    assert not sizes.takes(kind, called((2, 5, 4), more=True))
    assert not sizes.takes(kind, called((2, 5, 3), more=False))
    wide = given("cpu", (torch.ones(2, 5, 3, dtype=torch.float64),), {"more": True})
    assert not sizes.takes(kind, wide)


@pytest.mark.parametrize("shapes", [[], [(5, 3)], [(2, 5, 3), (2, 6, 3)], [(2, 5, 3), (2, 5)], [(2, 5, 3, 4)]])
def test_calls_with_other_tensors_have_no_kind_of_any_number_of_tokens(shapes):
    assert by_token(called(*shapes)) is None
