"""Attention as CUDA graphs, where there is no GPU: with what stands for a graph (`pretended_graphs.py`)."""

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import GradientEdge

from moe_accel import garbage, graphs, lora
from tests import graphs as cases
from tests.families import available_families, build_tiny
from tests.graphs import batch, graphs_of, told, trained, turns
from tests.pretended_graphs import Pretended
from tests.unit.graph_chain import (
    Attends,
    AttendsByFunctions,
    Seen,
    assert_same_gradients,
    assert_trains_alike,
    chain,
    gradients,
    rows,
)


def models(family):
    """The model, the same as it is, and what of it is recorded."""
    model = build_tiny(family)
    twin = copy.deepcopy(model)
    found = graphs.record_attention(model, Pretended())
    for each in (model, twin):
        graphs.leave_cache_out(each)
    return model, twin, found


def pair(family="qwen3_moe"):
    model, twin, found = models(family)
    assert found
    return model, twin


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "qwen3_next", "granitemoe", "qwen3_vl_moe"])
def test_trains_as_without(family):
    cases.trains_as_without(pair, family)


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.__name__)
def test_that(case):
    case(pair)


@pytest.mark.filterwarnings("ignore:.*because of calls of which no three are alike|.*without a CUDA graph. hooks, or")
@pytest.mark.parametrize("change", cases.CHANGES)
def test_a_change_is_seen(change):
    cases.a_change_is_seen(pair, change)


def test_layers_that_change_their_order_are_recorded_anew():
    layers, twin = chain(3)
    for step, order in enumerate([(0, 1, 2)] * 4 + [(0, 2, 1)] * 5):
        assert_trains_alike(layers, twin, order, rows(step))
    assert turns(layers) == [2, 2, 2]


def test_a_layer_that_others_took_memory_from_has_no_backward():
    layers, _ = chain()
    for step in range(3):
        gradients(layers, (0, 1), rows(step))
    first, _ = layers[0](rows(4))
    second, _ = layers[1](first.detach().requires_grad_())
    first.sum().backward()
    with pytest.raises(RuntimeError, match=r"^cuda_graphs: "):
        second.sum().backward()


@pytest.mark.parametrize("step", range(2, 6))
def test_weights_and_inputs_may_need_no_gradient(step):
    layers, twin = chain()
    for each in (layers, twin):
        each[0].inner.weight.requires_grad_(False)
        each[1].inner.bias.requires_grad_(False)
    for at in range(step):
        for each in (layers, twin):
            each.zero_grad()
            each[1](each[0](rows(at).detach())[0])[0].sum().backward()
    found, expected = ([each.grad for each in both.parameters()] for both in (layers, twin))
    assert [each is None for each in found] == [each is None for each in expected] == [True, False, False, True]
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True) if each[0] is not None)


@pytest.mark.parametrize("step", [graphs.CALLS, graphs.CALLS + 3], ids=["in a trial", "by itself"])
@pytest.mark.parametrize("was_trained", [True, False])
def test_weights_may_be_frozen_or_not_between_forward_and_backward(step, was_trained):
    layers, twin = chain()
    for each in (layers, twin):
        each[0].inner.weight.requires_grad_(was_trained)
    for at in range(step):
        both = (trained_chain(each, rows(at)) for each in (layers, twin))
        assert all(map(torch.equal, *both))
    found = [trained_chain(each, rows(step), each[0].inner.weight) for each in (layers, twin)]
    assert turns(layers) == [step - graphs.CALLS + 1] * 2
    assert len(found[0]) == len(found[1]) == 3
    assert all(map(torch.equal, *found))


def trained_chain(layers, x, turned=None):
    """Gradients, where there are some; of `turned` it is changed before backward whether it wants one."""
    layers.zero_grad()
    loss = layers[1](layers[0](x)[0])[0].square().sum()
    if turned is not None:
        turned.requires_grad_(not turned.requires_grad)
    loss.backward()
    return [each.grad for each in layers.parameters() if each.grad is not None]


def test_one_that_waits_for_others_for_ever_is_told_and_lets_them_play():
    layers, twin = chain(3)
    kept = []
    with told() as said:
        for step in range(30):
            for each in (layers, twin):
                each.zero_grad()
                x = each[0](rows(step))[0]
                if step == 5:
                    kept.append(x)  # its backward may come, and does not
                    x = x.detach()
                last = each[2](each[1](x)[0], mask=min(step, 6))[0]
                last.square().sum().backward()
            assert_same_gradients(layers, twin)
    why = "forwards without a backward, or of calls that are not alike"
    assert said == [f"Attends is computed without a CUDA graph so far, because of {why}"]
    assert not graphs_of(layers[1])[0].recording.trial.is_due
    assert turns(layers)[2] == 0


class InFull(Attends):
    """A product in fp32 under autocast, too."""

    def forward(self, x, mask=None, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return self.inner(x.float()).tanh(), mask


def test_backward_is_recorded_without_the_autocast_of_forward():
    torch.manual_seed(0)
    layers = nn.ModuleList([InFull(), InFull()])
    twin = copy.deepcopy(layers)
    graphs.record_attention(layers, Pretended())
    for step in range(6):
        found = []
        for each in (layers, twin):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                made = each[1](each[0](rows(step))[0])[0]
            made.square().sum().backward()
            found.append([parameter.grad for parameter in each.parameters()])
        assert all(map(torch.equal, *found)), step
    assert turns(layers) == [4, 4]


def test_what_has_nothing_to_train_is_recorded_when_it_has():
    layers, twin = chain(1)
    layers.requires_grad_(False)
    with told() as said:
        for step in range(5):
            assert torch.equal(layers[0](rows(step).detach())[0], twin[0](rows(step))[0])
        layers.requires_grad_()
        for step in range(graphs.OTHER_CALLS + 6):
            assert_trains_alike(layers, twin, (0,), rows(step))
    assert not said
    assert turns(layers)[0] > 0


HOOKED = "hooks, or another forward, inside of it"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda layers: setattr(layers[0], "dropout", 0.1), "dropout"),
        (lambda layers: setattr(layers[0], "inner", nn.Sequential(layers[0].inner, nn.Dropout(0.1))), "dropout"),
        (lambda layers: layers[0].inner.register_forward_hook(lambda *given: None), HOOKED),
    ],
)
def test_it_is_told_once_what_is_not_recorded(spoil, why):
    layers, _ = chain()
    spoil(layers)
    with told() as said:
        for step in range(8):
            gradients(layers, (0, 1), rows(step))
    assert said == [f"Attends is computed without a CUDA graph: {why}"]
    assert turns(layers) == [None, 6]


def test_calls_with_something_else_are_told_once():
    layers, _ = chain()
    with told() as said:
        for _ in range(15):
            for layer in layers:
                layer(rows(0), mask=object())
    assert said == ["Attends is computed without a CUDA graph so far, because of object"]


def test_calls_that_are_never_alike_are_told_once():
    layers, _ = chain()
    with told() as said:
        for at in range(15):
            for layer in layers:
                layer(rows(0), mask=at)
    assert said == ["Attends is computed without a CUDA graph so far, because of calls of which no three are alike"]


def test_calls_of_another_kind_are_recorded_when_they_stay():
    layers, twin = chain()
    for step in range(3 + graphs.OTHER_CALLS + 6):
        length = 3 if step < 3 else 5
        found, expected = (gradients(each, (0, 1), rows(step, length)) for each in (layers, twin))
        assert all(map(torch.equal, found, expected))
    assert turns(layers) == [3, 3]


class Fails(Pretended):
    """After which nobody records."""

    def record(self, work):
        self.has_failed = True
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_is_computed_as_ever():
    layers, twin = chain(recorder=Fails())
    with told() as said:
        for step in range(5):
            assert_trains_alike(layers, twin, (0, 1), rows(step))
    why = "operation not permitted when stream is capturing"
    assert said == [f"Attends is computed without a CUDA graph: {why}"]
    assert not any(turns(layers))


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", ["", "at the beginning", "in between"])
def test_garbage_is_not_collected_while_a_graph_is_recorded(monkeypatch, fails, collects):
    recorder, seen = graphs.Recorder(), []

    class Captures:
        """Of torch.cuda.CUDAGraph, what the recorder calls."""

        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            seen.append(gc.isenabled())
            if fails == "at the beginning":
                raise RuntimeError("operation not permitted when stream is capturing")

        def capture_end(self):
            seen.append(gc.isenabled())

        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captures)
    for owner, name in ((recorder, "_leave_pool"), (recorder, "_record_nothing"), (graphs.recorder, "_make_room")):
        monkeypatch.setattr(owner, name, lambda: None)

    def work():
        seen.append(gc.isenabled())
        if fails == "in between":
            raise RuntimeError("operation not permitted when stream is capturing")
        return 3

    if not collects:
        gc.disable()
    try:
        with pytest.raises(RuntimeError, match="not permitted") if fails else nullcontext():
            assert recorder.record(work)[1] == 3
        assert seen == [False] * (2 if fails == "at the beginning" else 3)
        assert gc.isenabled() is collects
        assert recorder.has_failed is bool(fails)
    finally:
        gc.enable()


def test_parameters_that_move_all_the_time_are_given_up():
    layers, twin = chain()
    with told() as said:
        for step in range(16):
            for each in (layers, twin):
                each[0].inner.weight.data = each[0].inner.weight.data.clone()
            assert_trains_alike(layers, twin, (0, 1), rows(step))
    why = "its calls overlap, or its parameters or attributes change, all the time"
    assert said == [f"Attends is computed without a CUDA graph: {why}"] * 2


def test_a_model_goes_when_nobody_has_it():
    layers, _ = chain()
    for step in range(4):
        gradients(layers, (0, 1), rows(step))
    assert turns(layers) == [2, 2]
    layers[1](layers[0](rows(4))[0])  # waits for its backward
    held = layers[0], layers[0].inner.weight, graphs_of(layers[0])[0].recorder
    gone = [weakref.ref(each) for each in held]
    with garbage.left_alone():
        del layers, held
        assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_records_for_itself(copied):
    layers, twin = chain()
    for step in range(4):
        gradients(layers, (0, 1), rows(step))
    other = copied(layers)
    assert (turns(layers), turns(other)) == ([2, 2], [0, 0])
    own, others = (graphs_of(each[0])[0].recorder for each in (layers, other))
    assert own is not others is graphs_of(other[1])[0].recorder
    assert list(other.state_dict()) == list(twin.state_dict())
    for step in range(4):
        assert_trains_alike(other, twin, (0, 1), rows(step))
    assert (turns(layers), turns(other)) == ([2, 2], [2, 2])


def test_attention_with_adapters_is_recorded():
    made = []
    for model in pair():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        made.append(get_peft_model(model, config))
        assert lora.install(made[-1]) == (6, {})
    for step in range(5):
        cases.change_both(*made, step)
        cases.assert_same(*(trained(model, batch(model, step)) for model in made))
    assert turns(made[0]) == [3, 3]
    for model in made:
        for each in model.modules():
            if hasattr(each, "scaling") and hasattr(each, "lora_A"):
                each.scaling["default"] *= 2
    cases.assert_same(*(trained(model, batch(model, 5)) for model in made))
    assert turns(made[0]) == [0, 0]


def test_what_backward_reads_stays_where_a_function_in_python_comes_last():
    layers = nn.ModuleList([AttendsByFunctions()])
    graphs.record_attention(layers, Pretended())
    Seen.contexts.clear()
    for step in range(5):
        gradients(layers, (0,), rows(step))
    assert turns(layers) == [3]
    alive = [at for at, each in enumerate(Seen.contexts) if each() is not None]
    recorded = 2 * (graphs.CALLS + 1)  # after as many calls as ever, and one before it is recorded
    assert {recorded, recorded + 1} <= set(alive)
    # In torch 2.13 `grad_fn` of a function in Python keeps that, too; in 2.11 only the token of its edge does.
    (edge,) = graphs_of(layers[0])[0].recording._held
    assert isinstance(edge, GradientEdge)
    assert edge.ownership_token is not None


def test_a_dict_that_is_replaced_is_seen():
    layers, _ = chain()
    for layer in layers:
        layer.inner.scaling = {"default": 1.0}
    for step in range(4):
        gradients(layers, (0, 1), rows(step))
    assert turns(layers) == [2, 2]
    layers[0].inner.scaling = {"default": 0.5}
    gradients(layers, (0, 1), rows(4))
    assert turns(layers) == [0, 0]


def test_use_cache_may_be_given_by_place():
    model = build_tiny("qwen3_moe")
    graphs.leave_cache_out(model)
    index = batch(model, 0)["input_ids"]
    assert model(index).past_key_values is None
    assert model(index, use_cache=True).past_key_values is not None
    assert model(index, None, None, None, None, None, True).past_key_values is not None
    assert model.eval()(index).past_key_values is not None


@pytest.mark.parametrize("family", sorted(available_families()))
def test_every_family_trains_as_without(family):
    """Also those whose attention gets something that is not recorded."""
    model, twin, _ = models(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*CUDA graph so far, because of (a mask|dict|UserDict)")
        for step in range(5):
            given = batch(model, step, 13, family)
            cases.assert_same(trained(model, given), trained(twin, given))
