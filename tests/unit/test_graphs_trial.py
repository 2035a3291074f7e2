"""What is played of recorded graphs is tried beside the module's own computation, all layers in one step."""

from contextvars import ContextVar

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_accel import graphs
from moe_accel.graphs.trial import OPEN, TOLERANCE, Round, Trial, near
from tests.graphs import told, turns
from tests.pretended_graphs import Pretended
from tests.unit.graph_chain import Attends, chain, gradients, rows

WRONG = "what was recorded is not what the module computes"


class Wrong(Pretended):
    """Plays something else."""

    wrong = ("_compute", "_differentiate")

    def record(self, work):
        play, made = super().record(work)
        (*_, last) = self.made[work.func.__self__]

        def other():
            play()
            last.mul_(1.1)

        return (other if work.func.__name__ in self.wrong else play), made


class WrongForward(Wrong):
    wrong = ("_compute",)


class WrongBackward(Wrong):
    wrong = ("_differentiate",)


@pytest.mark.parametrize("recorder", [Wrong, WrongForward, WrongBackward])
def test_what_is_recorded_wrong_is_not_used(recorder):
    layers, twin = chain(recorder=recorder())
    with told() as said:
        for step in range(5):
            assert all(map(torch.equal, gradients(layers, (0, 1), rows(step)), gradients(twin, (0, 1), rows(step))))
    assert said == [f"Attends is computed without a CUDA graph: {WRONG}"] * 2
    assert turns(layers) == [None, None]


class Leaves(Pretended):
    """What a layer's backward needs to the layers after it."""

    def __init__(self):
        super().__init__()
        self.spoiled = set()

    def record(self, work):
        play, made = super().record(work)
        number, ours = work.func.__self__.number, self.made[work.func.__self__]

        def forward():
            play()
            self.spoiled |= set(range(1, number))
            self.spoiled.discard(number)

        def backward():
            play()
            for each in ours[-2:] if number in self.spoiled else ():
                each.mul_(1.1)

        return (forward if work.func.__name__ == "_compute" else backward), made


def test_what_layers_do_to_the_memory_of_each_other_is_seen():
    layers, twin = chain(3, Leaves())
    with told() as said:
        for step in range(6):
            both = (gradients(each, (0, 1, 2), rows(step)) for each in (layers, twin))
            assert all(map(torch.equal, *both)), step
    assert said == [f"Attends is computed without a CUDA graph: {WRONG}"] * 2
    assert turns(layers) == [None, None, 4]
    assert not trial_of(layers[2]).is_due
    alone, twin = chain(1, Leaves())
    for step in range(6):
        assert all(map(torch.equal, gradients(alone, (0,), rows(step)), gradients(twin, (0,), rows(step))))
    assert turns(alone) == [4]


def trial_of(layer):
    return vars(layer)["_moe_accel_graphs"].recording.trial


def test_all_are_tried_again_when_another_is_recorded():
    layers, twin = chain(2)
    due = []
    for step in range(7):
        for each in (layers, twin):
            each.zero_grad()
            each[1](each[0](rows(step))[0], mask=min(step, 2))[0].square().sum().backward()
        for one, other in zip(layers.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        due.append([trial_of(each).is_due if turns(each)[0] else None for each in layers])
    assert due[1:] == [[None, None], [False, None], [False, None], [True, False], [False, False], [False, False]]


@pytest.mark.parametrize("factor", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("recorder", [Pretended, WrongBackward])
def test_gradients_that_say_nothing_are_not_taken_for_a_trial(factor, recorder):
    layers, twin = chain(2, recorder())

    def step(at, by):
        for each in (layers, twin):
            each.zero_grad()
            (each[1](each[0](rows(at))[0])[0].square().sum() * by).backward()
        for one, other in zip(layers.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)

    with told() as said:
        for at in range(6):
            step(at, factor)
        assert all(trial_of(each).is_due for each in layers)
        for at in range(6, 9):
            step(at, 1)
    if recorder is Pretended:
        assert (said, turns(layers)) == ([], [7, 7])
        assert not any(trial_of(each).is_due for each in layers)
    else:
        assert said == [f"Attends is computed without a CUDA graph: {WRONG}"] * 2


def test_a_trial_that_stays_open_is_told():
    layers, _ = chain(1)
    with told() as said:
        for step in range(graphs.CALLS + OPEN + 3):
            (layers[0](rows(step))[0] * 0).sum().backward()
    why = "its gradients were zero, infinite or not asked for 50 times"
    assert said == [f"Attends is computed without a CUDA graph: {why}"]
    assert turns(layers) == [None]


def test_a_trial_computes_as_its_forward_in_backward_too():
    seen, inside = [], ContextVar("inside", default=False)

    class Looks(Attends):
        def forward(self, x, mask=None, **kwargs):
            allowed = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
            seen.append((*allowed, inside.get()))
            return super().forward(x, mask)

    layers = nn.ModuleList([Looks()])
    graphs.record_attention(layers, Pretended())
    layers[0].register_forward_pre_hook(lambda *given: inside.set(True) and None)
    layers[0].register_forward_hook(lambda *given: inside.set(False) and None)
    for step in range(3):
        with sdpa_kernel(SDPBackend.MATH):
            x = layers[0](rows(step))[0]
        x.sum().backward()
    assert turns(layers) == [1]
    assert not trial_of(layers[0]).is_due
    # Twice as ever, before and while it is recorded, played and by itself, by itself in backward.
    assert seen == [(True, False, True)] * 7
    assert torch.backends.cuda.flash_sdp_enabled()


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
        for _ in range(OPEN - 1):
            trial.compare_outputs([torch.ones(2)], [torch.ones(2)])
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
