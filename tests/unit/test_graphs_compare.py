"""How what is played of a recorded module is compared with what the module computes."""

import pytest
import torch

from moe_accel.graphs.trial import TOLERANCE, Round, Trial, near
from tests.unit.graph_chain import WRONG


def passed(trial):
    trial.compare_outputs([torch.ones(2)], [torch.ones(2)])
    trial.compare_gradients([torch.ones(2), None], [torch.ones(2), None], [torch.ones(2)])
    return not (trial.is_due or trial.problem)


def test_one_that_fails_lets_all_others_be_tried_again():
    both = Round()
    one, other = Trial(both), Trial(both)
    assert passed(one)
    other.compare_outputs([torch.ones(2)], [torch.zeros(2)])
    assert other.problem == WRONG
    assert one.is_due
    assert passed(one)


def test_what_is_not_a_number_in_both_is_the_same():
    trial, nan = Trial(Round()), torch.tensor([1.0, torch.nan])
    trial.compare_outputs([nan, torch.tensor([1])], [nan.clone(), torch.tensor([1])])
    assert not trial.problem
    trial.compare_outputs([torch.ones(2), torch.tensor([1])], [nan, torch.tensor([1])])
    assert trial.problem == WRONG


def test_open_trials_are_counted_from_the_last_that_was_over():
    trial = Trial(Round())
    for _ in range(3):
        for open_now in range(3):
            assert trial.num_open == open_now
            trial.compare_outputs([torch.ones(2)], [torch.ones(2)])
        assert passed(trial)
    trial.compare_gradients([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)])
    assert passed(trial)


ONES, TWICE, SOME = torch.ones(3), torch.full((3,), 2.0), torch.tensor([1.0, torch.inf, 1.0])


@pytest.mark.parametrize(
    ("found", "own", "given", "expected"),
    [
        ([ONES, TWICE], [ONES, TWICE], [ONES], True),
        ([ONES, TWICE * (1 + 0.9 * TOLERANCE)], [ONES, TWICE], [ONES], True),
        ([ONES, TWICE * (1 + 1.1 * TOLERANCE)], [ONES, TWICE], [ONES], False),
        ([SOME, TWICE], [ONES, TWICE], [ONES], False),
        ([ONES, SOME], [ONES, SOME], [ONES], None),
        ([ONES, ONES], [ONES, SOME], [ONES], None),
        ([ONES, ONES], [TWICE, TWICE], [SOME, ONES], None),
        ([ONES, ONES], [TWICE, TWICE], [0 * ONES, ONES], False),
        ([ONES, ONES], [TWICE, TWICE], [0 * ONES, 0 * ONES], None),
        ([ONES, None], [ONES, None], [ONES], True),
        ([ONES, None], [ONES, ONES], [ONES], False),
        ([ONES, None], [None, ONES], [ONES], False),
        ([None, None], [None, None], [ONES], True),
    ],
)
def test_gradients_are_near(found, own, given, expected):
    assert near(found, own, given) is expected
