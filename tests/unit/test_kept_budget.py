"""`kept_layers: auto`, its arithmetic: what bounds a peak to come, and what is kept at each stage."""

import pytest

from moe_accel.kept.budget import Budget, Peak
from moe_accel.kept.policy import Policy, Step

TOKENS = 100


def budget(limit=1000.0, costs=(1.0,) * 8, base=300.0):
    """Eight layers of 100 bytes each at 100 tokens; without any, 300 of 1000 bytes, 100 of them there anyway."""
    made = Budget(costs, limit)
    made.learn(Peak(0, TOKENS, 100.0, base))
    return made


def test_as_many_layers_as_fit_and_never_more_than_there_are():
    assert [budget(limit).most(TOKENS) for limit in (299, 399, 400, 1000, 1100, 9000)] == [0, 0, 1, 7, 8, 8]
    assert Budget((1.0,), 9000.0).most(1) == 0, "before anything was seen"


def test_longer_batches_are_expected_to_need_more_and_shorter_ones_no_less_without_kept_layers():
    made = budget()
    assert made.bound(3, TOKENS) == 300 + 3 * 100
    assert made.bound(3, 2 * TOKENS) == 100 + 2 * 200 + 3 * 200
    assert made.bound(3, TOKENS // 2) == 300 + 3 * 50
    assert [made.most(tokens) for tokens in (50, 100, 150, 200, 600)] == [8, 7, 4, 2, 0]


def test_a_layer_that_costs_more_counts_as_what_it_costs():
    assert budget(costs=(1.0, 4.0, 1.0, 4.0)).most(TOKENS) == 3
    assert budget(costs=(4.0, 4.0, 1.0, 1.0)).most(TOKENS) == 1


def test_a_peak_that_is_elsewhere_makes_room_for_more():
    """Kept layers are gone when the optimizer has its peak: the first choice is careful, and the next knows."""
    made = budget(limit=700, base=600.0)
    assert made.most(TOKENS) == 1
    assert not made.learn(Peak(1, TOKENS, 100.0, 600.0), at_least=600.0)
    assert made.most(TOKENS) == 2


def test_a_peak_above_its_bound_raises_all_bounds():
    made = budget()
    assert made.learn(Peak(7, TOKENS, 100.0, 1180.0), at_least=1180.0)
    assert made.factor == pytest.approx(1.2)
    assert made.bound(7, TOKENS) == pytest.approx(1180.0)
    assert made.bound(0, TOKENS) == pytest.approx(100 + 1.2 * 200)
    assert made.most(TOKENS) == 5


def test_a_peak_of_an_earlier_step_surprises_nobody():
    made = budget()
    assert not made.learn(Peak(2, TOKENS, 100.0, 990.0), at_least=0.0)
    assert (made.factor, made.most(TOKENS)) == (1.0, 7)


def step(peak, limit=1000.0, reached=None, pressed=False, passing=(1.0,), holding=(0.0,)):
    reached = peak if reached is None else reached
    return Step(peak, reached, 100.0, limit, pressed, passing, holding)


def planned(limit=1000.0):
    """A policy of eight layers of one kind that has measured."""
    policy = Policy((0,) * 8)
    policy.learn(step(900.0, limit), 0, TOKENS)
    policy.learn(step(300.0, limit), 0, TOKENS)
    policy.learn(step(400.0, limit, holding=(2.0,)), 1, TOKENS)
    assert policy.stage == "planned"
    return policy


def test_each_kind_of_layer_is_kept_once_before_any_other_is():
    policy = Policy((0, 1, 0, 1))
    seen = [(policy.stage, policy.choose(TOKENS))]
    for holding in ((0, 0), (0, 0), (3.0, 0), (0, 5.0)):
        policy.learn(step(300.0, passing=(1.0, 1.0), holding=holding), 0, TOKENS)
        seen.append((policy.stage, policy.choose(TOKENS)))
    assert seen == [("warm", ()), ("base", ()), ("probe", (0,)), ("probe", (1,)), ("planned", (0, 1))]
    assert policy.budget is not None
    assert policy.budget.bytes_of(2, TOKENS) == TOKENS * (2.0 + 4.0)


def test_nothing_is_tried_with_a_batch_that_may_be_too_large_without_any():
    policy = Policy((0,))
    policy.learn(step(900.0), 0, TOKENS)
    policy.learn(step(900.0), 0, TOKENS)
    assert (policy.choose(TOKENS), policy.choose(2 * TOKENS)) == ((0,), ())
    policy.learn(step(950.0), 0, 2 * TOKENS)
    assert (policy.stage, policy.choose(TOKENS)) == ("probe", (0,))


@pytest.mark.parametrize(
    ("peak", "holding", "why"), [(1001.0, 2.0, "a step without any leaves"), (300.0, 1.0, "what a layer holds can't")]
)
def test_where_nothing_fits_or_can_be_measured_none_are_kept(peak, holding, why):
    policy = Policy((0,) * 8)
    for _ in range(2):
        policy.learn(step(peak), 0, TOKENS)
    policy.learn(step(peak, holding=(holding,)), 1, TOKENS)
    assert (policy.stage, policy.choose(1)) == ("none", ())
    assert policy.why_none.startswith(why)


def test_a_step_that_nobody_knows_the_peak_of_is_repeated():
    policy = Policy((0,))
    policy.learn(step(100.0), 0, TOKENS)
    policy.learn(step(float("inf")), 0, TOKENS)
    assert policy.stage == "base"


def test_an_allocator_that_gives_back_its_cache_twice_in_a_row_has_less_room_than_it_looks():
    policy = planned()
    assert len(policy.choose(TOKENS)) == 7
    told = [policy.learn(step(990.0, pressed=pressed), 7, TOKENS) for pressed in (True, False, True, True)]
    assert told == [False, False, False, True]
    assert len(policy.choose(TOKENS)) == 6


def test_what_others_take_meanwhile_is_not_there_and_does_not_come_back():
    policy = planned()
    for limit, expected in ((800.0, 5), (1000.0, 5)):
        policy.learn(step(700.0, limit, reached=0.0), 4, TOKENS)
        assert len(policy.choose(TOKENS)) == expected
