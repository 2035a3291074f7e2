"""Adapters in the GEMMs of the weights they belong to: PEFT's numbers, and nothing left behind when weights move."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file

from moe_accel import MoEConfig, expert_lora_config, experts
from moe_accel.experts import joined
from moe_accel.experts.joined import Joined, Projection
from moe_accel.kernels import rows, te_parts
from moe_accel.kernels.grouped import TORCH
from tests.families import build_tiny, experts_modules, randomise, tiny_inputs, tiny_loss
from tests.unit.expert_adapters import adapted, assert_same, noting, prepared, training

pytestmark = pytest.mark.usefixtures("new_accelerate_state")


@pytest.fixture
def everywhere(monkeypatch):
    """Join on the CPU, too."""
    monkeypatch.setattr(joined, "takes_torch_grouped_mm", lambda *_: True)


def settings(model):
    return [experts.settings_of(module) for _, module in experts_modules(model)]


@pytest.fixture
def used(monkeypatch):
    """For every product of rows with a projection that has an adapter: whether one GEMM did both."""
    found = []
    monkeypatch.setattr(Projection, "product", noting(Projection.product, found))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "gemma4"])
def test_losses_and_gradients_are_those_of_peft(family, checkpointing, everywhere, used):
    model = adapted(family)
    expected = training(model, family)
    ours: Any = prepared(model)
    if checkpointing:
        ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        ours.enable_input_require_grads()
    assert all(len(each.joined) == 2 for each in settings(ours))
    assert_same(training(ours, family), expected)
    assert used
    assert all(used)


@pytest.mark.parametrize(("of_te", "joins"), [(("permutation",), True), (("experts",), False)], ids=str)
def test_adapters_are_joined_where_torch_multiplies(of_te, joins, everywhere, package):
    package.setattr(te_parts, "check", lambda device, names: None)
    model = adapted()
    expected = training(model, "qwen3_moe")
    ours: Any = prepared(model, kernels="te", te_parts=list(of_te))
    assert [len(each.joined) for each in settings(ours)] == [2 if joins else 0] * 2
    assert_same(training(ours, "qwen3_moe"), expected)


def test_lean_experts_give_the_same_bits(everywhere, used):
    model: Any = prepared(adapted())
    found = [training(model, "qwen3_moe")]
    for each in settings(model):
        each.lean = True
    found.append(training(model, "qwen3_moe"))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert all(used)


def test_another_adapter_may_run_between_forward_and_backward(everywhere, used):
    """What a reference model does that is another adapter of the same base."""
    model = adapted()
    model.add_adapter("other", replace(model.peft_config["default"]))
    randomise(model, seed=8, only=".other.")
    found = []
    for each in (model, prepared(model)):
        loss = tiny_loss(each, tiny_inputs("qwen3_moe"))
        each.set_adapter("other")
        tiny_loss(each, tiny_inputs("qwen3_moe"))
        with each.disable_adapter():
            tiny_loss(each, tiny_inputs("qwen3_moe"))
        each.set_adapter("default")
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in each.named_parameters() if p.grad is not None}))
    assert_same(found[1], found[0])
    assert all(used)


def test_an_adapter_changed_between_forward_and_backward_is_an_error_where_its_place_was_taken(everywhere):
    ours: Any = prepared(adapted())
    loss = tiny_loss(ours, tiny_inputs("qwen3_moe"))
    with torch.no_grad():
        for name, each in ours.named_parameters():
            if "experts" in name and "lora_B" in name:
                each.mul_(2)
    tiny_loss(ours, tiny_inputs("qwen3_moe"))
    with pytest.raises(RuntimeError, match="changed in place between a forward pass and its backward pass"):
        loss.backward()


@pytest.mark.parametrize("how", ["replaced", "moved", "rank"])
def test_weights_that_are_elsewhere_now_are_computed_beside(how, everywhere, used):
    model = adapted()
    ours: Any = prepared(model)
    if how == "rank":  # of two adapters together, where there is room for one
        for each in (model, ours):
            each.add_adapter("other", replace(each.peft_config["default"], r=9))
            randomise(each, seed=8, only=".other.")
            each.base_model.set_adapter(["default", "other"])
    modules: list[Any] = [module for _, module in experts_modules(ours)]
    for module in modules:
        if how == "replaced":
            module.down_proj.data = module.down_proj.data.clone()
        if how == "moved":
            module.to(torch.float64).to(torch.float32)
    expected = training(model, "qwen3_moe")
    assert_same(training(ours, "qwen3_moe"), expected)
    assert not all(used)
    left = {"replaced": {"gate_up_proj"}, "moved": set(), "rank": {"gate_up_proj", "down_proj"}}[how]
    assert all(each.joined.keys() == left for each in settings(ours)), "memory that no weight lies in any more"


def test_weights_and_saved_files_have_the_same_bits(everywhere, tmp_path):
    model = adapted()
    ours: Any = prepared(model)
    assert all(len(each.joined) == 2 for each in settings(ours))
    expected = model.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, each in (("expected", model), ("found", ours)):
        each.merge_and_unload().save_pretrained(tmp_path / name)
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_states_and_models_are_saved_and_read_as_ever(everywhere, used, tmp_path):
    """safetensors refuses a tensor that is a part of its memory: weights leave it for a state dict, and come back."""
    model = adapted()
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    accelerator = Accelerator(parallelism_config=MoEConfig())
    ours: Any = accelerator.prepare(model)
    before = training(ours, "qwen3_moe")
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(ours, tmp_path / "model")
    saved = load_file(tmp_path / "state" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    modules: list[Any] = [module for _, module in experts_modules(ours)]
    for name in ("gate_up_proj", "down_proj"):
        assert all(getattr(module, name).is_contiguous() for module in modules)
    for parameter in ours.parameters():
        parameter.data.zero_()
    accelerator.load_state(tmp_path / "state")
    used.clear()
    after = training(ours, "qwen3_moe")
    assert all(used)
    assert all(len(each.joined) == 2 for each in settings(ours))
    assert after[0] == before[0]
    assert all(torch.equal(gradient, after[1][name]) for name, gradient in before[1].items())


def test_weights_that_train_or_have_no_adapter_stay_where_they_are(everywhere):
    model = build_tiny("qwen3_moe", torch.float32)
    ours = prepared(get_peft_model(model, expert_lora_config(model, r=3, experts=False)))
    assert not any(each.joined for each in settings(ours))
    module: Any = next(module for _, module in experts_modules(ours))
    module.down_proj.requires_grad_(True)
    assert joined.join(module, "down_proj", 8) is None
    module.down_proj.requires_grad_(False)
    before = module.down_proj.detach().clone()
    assert joined.join(module, "down_proj", 8) is not None
    assert torch.equal(module.down_proj, before)
    assert joined.join(module, "down_proj", 8) is None  # once


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_joined_projection_and_of_its_transpose(transposed):
    generator = torch.Generator().manual_seed(0)
    matrix, a, b = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (5, 2), (2, 7))
    )
    place = Joined(matrix.mT.contiguous().mT if transposed else matrix, 2)
    assert place.matrix.stride(1 if transposed else 2) == 1
    place.hold(of := SimpleNamespace(write=lambda to_a, to_b: (to_a.copy_(a), to_b.copy_(b))))
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    index = torch.tensor([0] * 4 + [2] * 5)
    projection = Projection(TORCH, place.matrix, a, b, place.whole)
    for each, whole in ((projection, matrix + a @ b), (projection.transposed(), (matrix + a @ b).mT)):
        rows = torch.randn(9, whole.shape[1] + each.tail, generator=generator, dtype=torch.float64)
        expected = torch.einsum("pa,pab->pb", rows[:, : whole.shape[1]], whole[index])
        out, more = each.product(rows, each.low(rows, ends), ends)
        assert more is None
        torch.testing.assert_close(out, expected)
    of.write = lambda *_: pytest.fail("they are there already")
    place.hold(of)
    assert torch.equal(place.whole[:, :5, 7:], a)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_recompute_ends_before_the_second_projection(family, monkeypatch):
    """Where nothing behind the experts keeps anything."""
    counts = {"forward": 0, "sums": 0}
    product, sum_torch = Projection.product, rows.sum_torch

    def counting(self, rows, low, ends):
        counts["forward"] += 1
        return product(self, rows, low, ends)

    def counting_sums(*given):
        counts["sums"] += 1
        return sum_torch(*given)

    monkeypatch.setattr(Projection, "product", counting)
    monkeypatch.setattr(rows, "sum_torch", counting_sums)
    model: Any = prepared(build_tiny(family, torch.float32).train())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = tiny_loss(model, tiny_inputs(family))
    num_layers = len(list(experts_modules(model)))
    assert counts == {"forward": 2 * num_layers, "sums": num_layers}
    loss.backward()
    # recompute: the first projection; backward: the transposed of both, and the sum of x's gradient
    assert counts == {"forward": 5 * num_layers, "sums": 2 * num_layers}


class Written:
    """A source of adapters that counts how often it writes."""

    def __init__(self):
        self.times = 0

    def write(self, a, b):
        self.times += 1

    def is_same(self, other):
        return self is other


@pytest.mark.parametrize("is_recorded", [False, True])
def test_where_a_graph_writes_too_nobody_relies_on_what_was_written(is_recorded):
    place, one, other = Joined(torch.ones(2, 8, 16), 8), Written(), Written()
    place.is_recorded = is_recorded
    for source in (one, one, other, one):
        place.hold(source)
    assert (one.times, other.times) == ((3, 1) if is_recorded else (2, 1))
