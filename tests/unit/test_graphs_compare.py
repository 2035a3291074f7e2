"""How what is played of a recorded module is compared with what the module computes."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_accel.experts.later import Product
from moe_accel.graphs import record
from moe_accel.graphs.trial import TOLERANCE, Round, Trial, near
from tests.pretended_graphs import Pretended
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


@pytest.mark.parametrize("of_graph", [None, 4.0])
def test_gradients_that_backward_left_are_added_in_the_parameters_own_strides(of_graph):
    weight = nn.Parameter(torch.ones(2, 3, 3))
    recording: Any = record.Recording.__new__(record.Recording)
    recording._recorder = Pretended()
    recording._sources = [nn.Parameter(torch.ones(1)), weight]
    recording._found = [torch.zeros(1), None if of_graph is None else torch.full_like(weight, of_graph)]
    left = torch.arange(18.0).view(2, 3, 3)
    recording._later = [
        Product(weight.detach(), torch.Tensor.clone, (left,)),
        Product(weight.detach().transpose(1, 2), torch.Tensor.clone, (left,)),
    ]
    _, found = recording._found_later()
    assert torch.equal(found, left + left.transpose(1, 2) + (of_graph or 0))


@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_outputs_computed_in_tensors_of_other_sizes_may_differ_by_rounding_of_the_largest(dtype, room):
    own = torch.tensor([8.0, 0.25, torch.nan]).to(dtype)
    for off_by, agrees in ((0.5, True), (2.0, False)):
        found = own + torch.tensor([0.0, off_by * room * 8, 0.0]).to(dtype)
        for exactly in (True, False):
            trial = Trial(Round(), exactly)
            trial.compare_outputs([found], [own])
            assert (not trial.problem) is (agrees and not exactly)
