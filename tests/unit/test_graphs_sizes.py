"""Room for more tokens than a call has: what is put there, what is taken, and which calls fit."""

import weakref

import pytest
import torch

from moe_accel.graphs.calls import Unusual, given
from moe_accel.graphs.sizes import (
    MOST_TOKENS,
    ONE_IN,
    RAGGED,
    STEP,
    TOO_MANY,
    Capacity,
    Extent,
    OneRow,
    Seen,
    by_token,
    extent_of,
    most_alike,
)
from moe_accel.padding.attention import Packed
from moe_accel.padding.rows import Rows, Slots
from tests.pretended_graphs import Pretended


def called(*shapes, **kwargs):
    return given("cpu", tuple(torch.ones(each) for each in shapes), kwargs)


def of(*tensors):
    return given("cpu", tensors, {})


def room():
    return Capacity(Extent(STEP), "cpu")


def rows_of(*lengths):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    return Rows(1, sum(lengths), lengths, bounds, None)


def test_fewer_tokens_come_first_and_what_was_behind_them_is_gone():
    sizes = room()
    taken = torch.full((1, STEP, 3), torch.nan)
    tokens = torch.arange(30.0).view(2, 5, 3)
    sizes.begin(of(tokens))
    sizes.fill([taken], [tokens])
    assert taken[0, :10].equal(tokens.view(10, 3))
    assert not taken[0, 10:].any()
    assert sizes.behind[:, 0].tolist() == [False] * 10 + [True] * (STEP - 10)
    (cut,) = sizes.cut([taken])
    assert cut.equal(tokens)
    more = torch.ones(1, 12, 3)
    sizes.begin(of(more))
    assert sizes.behind[:, 0].tolist() == [False] * 12 + [True] * (STEP - 12)


def test_gradients_that_are_not_in_order_of_memory_are_put_in_order():
    sizes, taken = room(), torch.empty(1, STEP, 3)
    gradient = torch.ones(()).expand(2, 5, 3) * torch.arange(3.0).view(3, 1).t()
    turned = torch.arange(30.0).view(5, 2, 3).transpose(0, 1)
    for each in (gradient, turned, torch.ones(()).expand(2, 5, 3)):
        sizes.begin(of(each))
        sizes.fill([taken], [each])
        assert taken[0, :10].equal(each.reshape(10, 3))


def test_outputs_of_each_token_may_have_one_dimension_less():
    sizes = room()
    sizes.begin(of(torch.ones(2, 5, 3)))
    found = sizes.cut([torch.arange(1.0 * STEP), torch.ones(1, STEP, 4), None])
    assert found[0].equal(torch.arange(10.0))
    assert found[1].shape == (2, 5, 4)
    assert found[2] is None


@pytest.mark.parametrize("made", [torch.ones(()), torch.ones(4, STEP), (torch.ones(1, STEP, 3), 7)])
def test_what_is_not_of_each_token_is_refused(made):
    with pytest.raises(Unusual):
        room().check(made)


def test_all_tokens_and_nothing_are_not():
    room().check((torch.ones(1, STEP, 3), [torch.ones(STEP), None]))


def test_calls_fit_that_are_alike_but_for_their_tokens():
    sizes, kind = room(), by_token(called((2, 5, 3), more=True))
    assert sizes.takes(kind, called((1, STEP, 3), more=True))
    assert not sizes.takes(kind, called((1, STEP + 1, 3), more=True))
    assert not sizes.takes(kind, called((2, 5, 4), more=True))
    assert not sizes.takes(kind, called((2, 5, 3), more=False))
    wide = given("cpu", (torch.ones(2, 5, 3, dtype=torch.float64),), {"more": True})
    assert not sizes.takes(kind, wide)


@pytest.mark.parametrize("shapes", [[], [(5, 3)], [(2, 5, 3), (2, 6, 3)], [(2, 5, 3), (5,)], [(2, 5, 3, 4)]])
def test_calls_with_other_tensors_have_no_kind_of_any_number_of_tokens(shapes):
    assert by_token(called(*shapes)) is None


def test_sequences_are_in_slots_with_pieces_of_nothing_behind():
    slots = Slots(2 * STEP, 3, STEP, "cpu")
    slots.hold(rows_of(5, 0, 60))
    assert slots.lengths == (5, 0, 60, STEP, STEP - 65)
    assert slots.bounds.tolist() == [0, 5, 5, 65, 65 + STEP, 2 * STEP]
    slots.hold(rows_of(2 * STEP - 1))
    assert slots.lengths == (2 * STEP - 1, 1, 0, 0, 0)
    assert slots.bounds.tolist() == [0, 2 * STEP - 1, *[2 * STEP] * 4]
    slots.hold(rows_of(STEP, STEP))
    assert slots.lengths == (STEP, STEP, 0, 0, 0)


def packed(*lengths, window=None):
    return given("cpu", (torch.ones(1, sum(lengths), 3), Packed(rows_of(*lengths), window)), {})


def test_packed_sequences_fit_that_are_no_more_and_no_longer():
    sizes, kind = Capacity(Extent(2 * STEP, 2, STEP), "cpu"), by_token(packed(3, 4))
    assert sizes.takes(kind, packed(STEP, STEP))
    assert not sizes.takes(kind, packed(1, 1, 1))
    assert not sizes.takes(kind, packed(STEP + 1))
    assert not sizes.takes(kind, packed(3, 4, window=2))
    assert not sizes.takes(kind, called((1, 7, 3)))


def test_several_rows_fit_where_each_token_is_computed_by_itself_and_not_in_attention():
    one, several = called((1, 6, 3)), called((2, 3, 3))
    kind = by_token(one)
    assert room().takes(kind, several)
    assert not OneRow(Extent(STEP), "cpu").takes(kind, several)
    assert OneRow(Extent(STEP), "cpu").takes(kind, one)


def test_packed_sequences_are_found_wherever_they_are():
    found = given("cpu", (torch.ones(1, 7, 3), [(Packed(rows_of(3, 4), None), 1)]), {})
    assert extent_of(found) == Extent(7, 2, 4)


def test_recorded_calls_read_where_sequences_begin_from_one_place():
    sizes, first = Capacity(Extent(2 * STEP, 2, STEP), "cpu"), packed(3, 4, window=2)
    inputs, (args, _) = sizes.room_for(first)
    assert args[0] is inputs[0]
    assert args[1].window == 2
    assert args[1].rows.lengths[:2] == (3, 4)
    assert sizes.holds(first)
    other = packed(3, 4, window=2)
    assert not sizes.holds(other)
    sizes.begin(packed(9))
    assert args[1].rows.lengths[0] == 9


def noted(*sizes, limit=MOST_TOKENS, **how):
    seen = Seen()
    for each in sizes:
        seen.note(each, limit, **how)
    return seen


def test_a_capacity_is_for_the_most_of_all_that_were_seen_and_for_more_and_longer_sequences():
    seen = noted(*[[Extent(50 + at, 3, 20), Extent(STEP + 2, 2 + at % 3, 10)] for at in range(RAGGED + 1)])
    assert seen.are_enough
    assert seen.capacity() == Extent(2 * STEP, 8, STEP)
    assert seen.capacity(eighths=8) == Extent(3 * STEP, 8, STEP)
    assert not noted(*[[Extent(5)]] * RAGGED).are_enough
    seen.forget()
    assert not seen.calls
    assert seen.most == Extent()


def test_there_is_room_for_no_other_number_of_tokens_than_there_always_are():
    always = noted(*[[Extent(77, 1, 77)]] * (RAGGED + 1))
    assert always.capacity() == always.capacity(eighths=1) == Extent(77, 2, 77, 77)
    assert noted(*[[Extent(MOST_TOKENS - at)] for at in range(20)]).capacity() == Extent(MOST_TOKENS)
    assert Extent(77, 2, 77, 77).has_room_for(Extent(77, 1, 50))
    assert not Extent(77, 2, 77, 77).has_room_for(Extent(76, 1, 50))


def test_more_tokens_than_the_limit_may_be_constant_or_are_left_out():
    more, fewer = [Extent(MOST_TOKENS + 5, 3, 9)], [Extent(MOST_TOKENS - 5)]
    always_more = noted(*[more] * RAGGED, [Extent(MOST_TOKENS + 5, 2, 500)], constant=True)
    assert always_more.are_enough
    assert always_more.capacity() == Extent(MOST_TOKENS + 5, 6, 5 * STEP, MOST_TOKENS + 5)
    assert not noted(*[more] * 50).calls
    assert noted(*[more] * 5, fewer, *[more] * RAGGED, constant=True).most == Extent(MOST_TOKENS - 5)
    assert noted(*[more] * 5, fewer, *[more] * RAGGED, more, constant=True).capacity().fewest == MOST_TOKENS + 5
    assert noted(*[more] * 50, fewer, constant=True).calls == 1
    assert noted(*[fewer, more] * 20, constant=True).most == Extent(MOST_TOKENS - 5)
    assert not noted(*[[Extent(0)]] * 20, constant=True).calls
    assert not noted(*[[Extent(-1), Extent(5)]] * 20).calls


def test_one_in_so_many_may_be_too_large():
    seen = Seen()
    for _ in range(100):
        assert not seen.misses()
        for _ in range(ONE_IN):
            seen.fits()
    for _ in range(50):
        assert not seen.misses()
        seen.fits(as_much=True)
    assert [seen.misses() for _ in range(TOO_MANY + 1)] == [False] * TOO_MANY + [True]


def test_an_extent_is_of_tokens_and_of_sequences():
    assert extent_of(None) == Extent(-1)
    assert extent_of(called((2, 5, 3))) == Extent(10)
    assert extent_of(packed(3, 4, 1)) == Extent(8, 3, 4)


def test_more_ranks_have_fewer_tokens_each():
    assert [most_alike(ranks) for ranks in (2, 4, 8)] == [8192, 8192, 4096]


class Reading:
    """A recording whose backward may come."""

    is_pending = True

    def __init__(self, sizes):
        self.sizes = sizes


def test_what_a_backward_will_read_is_not_told_of_another_call():
    recorder, short, long = Pretended(), called((1, 5, 3)), called((1, 6, 3))
    sizes = recorder.capacity(Extent(STEP), short)
    sizes.begin(short)
    reading = Reading(sizes)
    recorder._waiting.append(weakref.ref(reading))
    assert recorder.is_read(sizes)
    assert recorder.capacity(Extent(STEP), short) is sizes
    other = recorder.capacity(Extent(STEP), long)
    assert other is not sizes
    assert not recorder.is_read(other)
    reading.is_pending = False
    assert recorder.capacity(Extent(STEP), short) is other
