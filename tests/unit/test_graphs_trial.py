"""What is played of recorded graphs is tried beside the module's own computation, all layers in one step."""

import copy
import weakref
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_accel import garbage, graphs
from tests.graphs import graphs_of, told, turns
from tests.pretended_graphs import Pretended
from tests.unit.graph_chain import (
    WRONG,
    Attends,
    AttendsByFunctions,
    Seen,
    assert_same_gradients,
    assert_trains_alike,
    chain,
    gradients,
    rows,
)


class Wrong(Pretended):
    """Plays something else."""

    wrong = ("_compute_recorded", "_differentiate_recorded")

    def record(self, work):
        play, made = super().record(work)
        (*_, last) = self.made[work.func.__self__]

        def other():
            play()
            last.mul_(1.1)

        return (other if work.func.__name__ in self.wrong else play), made


class WrongForward(Wrong):
    wrong = ("_compute_recorded",)


class WrongBackward(Wrong):
    wrong = ("_differentiate_recorded",)


@pytest.mark.parametrize("recorder", [Wrong, WrongForward, WrongBackward])
def test_what_is_recorded_wrong_is_not_used(recorder):
    layers, twin = chain(recorder=recorder())
    with told() as said:
        for step in range(5):
            assert_trains_alike(layers, twin, (0, 1), rows(step))
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

        return (forward if work.func.__name__ == "_compute_recorded" else backward), made


def test_what_layers_do_to_the_memory_of_each_other_is_seen():
    layers, twin = chain(3, Leaves())
    with told() as said:
        for step in range(6):
            assert_trains_alike(layers, twin, (0, 1, 2), rows(step))
    assert said == [f"Attends is computed without a CUDA graph: {WRONG}"] * 2
    assert turns(layers) == [None, None, 4]
    assert not trial_of(layers[2]).is_due
    alone, twin = chain(1, Leaves())
    for step in range(6):
        assert_trains_alike(alone, twin, (0,), rows(step))
    assert turns(alone) == [4]


def trial_of(layer):
    return graphs_of(layer)[0].recording.trial


def lagging(recorder, num_steps, first=2):
    """What is due of two layers after each step, the second of which is called otherwise before step `first`."""
    layers, twin = chain(2, recorder)
    due = []
    for step in range(num_steps):
        for each in (layers, twin):
            each.zero_grad()
            each[1](each[0](rows(step))[0], mask=min(step, first))[0].square().sum().backward()
        assert_same_gradients(layers, twin)
        due.append([trial_of(each).is_due if turns(each)[0] else None for each in layers])
    return due


def test_all_are_tried_again_when_another_is_recorded():
    due = lagging(Pretended(), 8)
    assert due[:4] == [[None, None]] * 2 + [[False, None]] * 2
    # The second is not recorded while the first plays by itself, and only what was recorded last is tried then.
    assert due[4:] == [[True, None], [True, False], [False, False], [False, False]]


def test_what_another_does_that_is_recorded_later_is_seen_before_it_is_used():
    with told() as said:
        due = lagging(Leaves(), 9, first=4)
    assert said == [f"Attends is computed without a CUDA graph: {WRONG}"]
    assert due[-1] == [None, False]


class LeavesForward(Pretended):
    """What forwards read that were recorded before."""

    def record(self, work):
        play, made = super().record(work)
        number, (*_, last) = work.func.__self__.number, self.made[work.func.__self__]

        def forward():
            play()
            if number < self._num_recorded:
                last.mul_(1.1)

        return (forward if work.func.__name__ == "_compute_recorded" else play), made


def test_what_recording_does_to_forwards_before_it_is_seen():
    layers, twin = chain(2, LeavesForward())
    with told() as said:
        for step in range(6):
            assert_trains_alike(layers, twin, (0, 1), rows(step))
    assert said == [f"Attends is computed without a CUDA graph: {WRONG}"]
    assert turns(layers) == [None, 4]


class CountsBackwards(Wrong):
    wrong, played = ("_compute_recorded",), 0

    def record(self, work):
        play, made = super().record(work)

        def counted():
            self.played += 1
            play()

        return (counted if work.func.__name__ == "_differentiate_recorded" else play), made


def test_no_backward_is_played_of_a_forward_that_was_wrong():
    recorder = CountsBackwards()
    layers, _ = chain(1, recorder)
    with told() as said:
        for step in range(4):
            gradients(layers, (0,), rows(step))
    assert (len(said), recorder.played) == (1, 0)


def test_a_trial_whose_backward_never_comes_keeps_nothing():
    held = ContextVar("held", default=None)

    class Collects(Attends):
        """As transformers collects hidden states: in a context variable."""

        def forward(self, x, mask=None, **kwargs):
            held.get().append(super().forward(x, mask)[0])
            return held.get()[-1], mask

    layers = nn.ModuleList([Collects()])
    graphs.record_attention(layers, Pretended())
    for step in range(6):
        token, made = held.set([]), None  # the last one's backward cannot come any more
        made = layers[0](rows(step))[0]
        held.get().append(made)
        held.reset(token)
        if step != graphs.CALLS:
            made.square().sum().backward()
    assert turns(layers) == [4], "the third step's does not wait for ever"
    assert not trial_of(layers[0]).is_due
    gone = [weakref.ref(each) for each in (layers[0], made.grad_fn)]
    with garbage.left_alone():
        del layers, made
        assert [each() for each in gone] == [None, None]


def test_a_loss_that_is_kept_keeps_no_module_and_nothing_of_a_trial():
    layers = nn.ModuleList([AttendsByFunctions()])
    graphs.record_attention(layers, Pretended())
    for step in range(graphs.CALLS + 1):
        loss = layers[0](rows(step))[0].square().sum()
        tried = Seen.contexts[-2:]
        loss.backward()
    assert turns(layers) == [1]
    assert [each() for each in tried] == [None, None]
    gone = weakref.ref(layers[0])
    with garbage.left_alone():
        del layers
        assert gone() is None
    assert loss.grad_fn is not None


def test_what_a_backward_to_come_reads_is_let_go_of_after_it():
    layers, twin = chain(1)
    for step in range(6):
        gradients(layers, (0,), rows(step))
    found = graphs_of(layers[0])[0]
    weight = SimpleNamespace(free_unsharded_param=None)  # as FSDP2 has for a weight that stays gathered
    found.gathered.append(weight)
    for each in (layers, twin):
        each.zero_grad()
    made = layers[0](rows(6))[0]
    found.recorder.has_failed = True
    layers[0](rows(7))
    assert vars(weight)
    made.sum().backward()
    twin[0](rows(6))[0].sum().backward()
    assert_same_gradients(layers, twin)
    layers[0](rows(8))
    assert not vars(weight)
    assert found.recording is None


class Scales(Attends):
    """By an attribute, as PEFT's layers do for the adapter that is on."""

    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x, mask=None, **kwargs):
        return self.inner(x * self.factor).tanh(), mask


def test_a_module_that_changes_before_its_backward_has_the_gradients_of_its_forward():
    torch.manual_seed(0)
    layers = nn.ModuleList([Scales()])
    twin = copy.deepcopy(layers)
    graphs.record_attention(layers, Pretended())
    with told() as said:
        for step in range(6):
            for each in (layers, twin):
                each.zero_grad()
                each[0].factor = 1.0
                made = each[0](rows(step))[0]
                each[0].factor = 2.0
                made.square().sum().backward()
            assert torch.equal(layers[0].inner.weight.grad, twin[0].inner.weight.grad)
    assert not said
    assert turns(layers) == [4]
    assert not trial_of(layers[0]).is_due


class Counts(Attends):
    """Its calls, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, mask=None, **kwargs):
        self.seen = self.seen + 1
        return self.inner(x).tanh(), mask


def test_a_buffer_that_forward_replaces_is_never_played_past():
    layers = nn.ModuleList([Counts()])
    graphs.record_attention(layers, Pretended())
    with told() as said:
        for step in range(12):
            gradients(layers, (0,), rows(step))
    why = "its calls overlap, or its parameters or attributes change, all the time"
    assert said == [f"Counts is computed without a CUDA graph: {why}"]
    assert layers[0].seen >= 12


def test_double_precision_is_tried_too():
    layers, twin = chain(1)
    layers.double(), twin.double()
    for step in range(5):
        x = rows(step).detach().double().requires_grad_()
        assert_trains_alike(layers, twin, (0,), x)
    assert not trial_of(layers[0]).is_due


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


def test_a_trial_that_stays_open_is_told_once_and_goes_on():
    layers, twin = chain(2)
    with told() as said:
        for step in range(graphs.CALLS + graphs.OPEN + 5):
            (layers[1](layers[0](rows(step))[0])[0] * 0).sum().backward()
        for step in range(3):
            assert_trains_alike(layers, twin, (0, 1), rows(step))
    assert said == ["Attends is recorded, and not used so far: its gradients were zero, infinite or not asked for"]
    assert not any(trial_of(each).is_due for each in layers)


class Shifts(Attends):
    """A tensor that it is given, in place."""

    def forward(self, x, mask=None, **kwargs):
        return self.inner(x).tanh() + mask.add_(1), None


def test_what_changes_a_tensor_that_it_is_given_is_tried_with_it_as_it_was():
    torch.manual_seed(0)
    layers = nn.ModuleList([Shifts()])
    twin = copy.deepcopy(layers)
    graphs.record_attention(layers, Pretended())
    with told() as said:
        for step in range(5):
            made = [each[0](rows(step), mask=torch.full((3, 1), 2.0))[0] for each in (layers, twin)]
            assert torch.equal(*made)
            made[0].sum().backward()
    assert not said
    assert turns(layers) == [3]
    assert not trial_of(layers[0]).is_due
