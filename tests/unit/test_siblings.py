"""q, k and v of one input in one function: PEFT's numbers, and never a result of another input, layer or adapter."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_accel import expert_lora_config, lora
from moe_accel.siblings import ATTRIBUTE, called_alike
from tests.families import build_tiny, randomise, tiny_inputs, tiny_loss
from tests.unit.expert_adapters import TOLERANCE, assert_same, training

QKV = ("q_proj", "k_proj", "v_proj")


def adapted(family="qwen3_moe", targets=(*QKV, "o_proj"), dtype=torch.float32, build=None, **options):
    model = build_tiny(family, **{"num_hidden_layers": 2, **(build or {})})
    model.set_experts_implementation("eager")  # takes fp64
    config = LoraConfig(r=3, lora_alpha=4, target_modules=list(targets), **options)
    model = get_peft_model(model, config if targets else expert_lora_config(model, r=3, experts=False))
    randomise(model, seed=7, only="lora_")
    return model.to(dtype)


@pytest.fixture
def sizes(monkeypatch):
    """How many layers each call of `lora_linears` computes."""
    found, original = [], lora.lora_linears

    def noting(x, parts, *args):
        found.append(len(parts))
        return original(x, parts, *args)

    monkeypatch.setattr(lora, "lora_linears", noting)
    return found


def ours(model):
    model = copy.deepcopy(model)
    lora.install(model)
    return model


def checkpointed(model, reentrant=False):
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, given = noise(2, 3, 5), []
    for out, rank in ((4, 2), (3, 1), (6, 3)):
        given += [noise(out, 5), noise(out), noise(rank, 5), noise(out, rank)]

    def computed(x, *given, which=(0, 1, 2)):
        parts = [lora.Part(*given[4 * at : 4 * at + 4], scaling=at + 0.5) for at in range(3)]
        outputs = lora.lora_linears(x, parts)
        return tuple(outputs[at] for at in which)

    for which in ((0, 1, 2), (1,), (0, 2)):  # an output may be used by nobody
        assert torch.autograd.gradcheck(lambda *each, which=which: computed(*each, which=which), (x, *given))
    for at, output in enumerate(computed(x, *given)):
        weight, bias, a, b = given[4 * at : 4 * at + 4]
        torch.testing.assert_close(output, x @ weight.T + bias + (at + 0.5) * (x @ a.T @ b.T))


def test_layers_whose_output_nobody_used_get_no_gradient():
    x, weight, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    leaves = [each.clone().requires_grad_() for each in (a, b, a, b)]
    outputs = lora.lora_linears(x, [lora.Part(weight, None, *leaves[at : at + 2], 1.0) for at in (0, 2)])
    outputs[1].sum().backward()
    assert [each.grad is None for each in leaves] == [True, True, False, False]


OPTIONS: dict[str, Any] = {
    "all": ({}, [3, 1]),
    "biased": ({"build": {"attention_bias": True}}, [3, 1]),
    "ranks": ({"rank_pattern": {"q_proj": 5, "v_proj": 1}, "alpha_pattern": {"k_proj": 9}}, [3, 1]),
    "q-and-v": ({"targets": ("q_proj", "v_proj")}, [2]),
    "k": ({"targets": ("k_proj",)}, [1]),
    "latent": ({"family": "deepseek_v3", "targets": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")}, [2, 1]),
    "shared-experts-too": ({"family": "deepseek_v3", "targets": ()}, [2, 1]),
}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize(
    "options", [each if each in ("all", "ranks") else pytest.param(each, marks=pytest.mark.slow) for each in OPTIONS]
)
def test_losses_and_gradients_are_those_of_peft(options, checkpointing, sizes):
    given, expected_sizes = OPTIONS[options]
    family = given.get("family", "qwen3_moe")
    model = adapted(**given, dtype=torch.float64)  # what norms and routers make fp32 is the same in both
    expected = training(model, family)
    found: Any = ours(model)
    if checkpointing is not None:
        checkpointed(found, checkpointing)
    assert_same(training(found, family), expected)
    assert set(sizes) == {*expected_sizes, *([1] * bool(checkpointing))}  # a reentrant forward has no gradients


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_of_bf16_layers_and_autocast_are_within_bf16_of_peft(autocast, sizes):
    alone = attention_of(adapted())
    if not autocast:
        for name in QKV:
            getattr(alone, name).base_layer.bfloat16()
    together = ours(alone)
    dtype = torch.float32 if autocast else torch.bfloat16
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for module in (alone, together):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [getattr(module, name)(given) for name in QKV]
        sum(each.float().square().sum() for each in outputs).backward()
        gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
        found.append({"x": given.grad, **dict(zip(QKV, outputs, strict=True)), **gradients})
    assert sizes == [3]
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype, name
        assert (found[1][name] - expected).abs().max() <= 8 * 2**-9 * expected.abs().max(), name


def test_gradients_accumulate(sizes):
    model = adapted()
    found = []
    for each in (model, ours(model)):
        losses = [tiny_loss(each, tiny_inputs("qwen3_moe", seed=seed)) for seed in (0, 1)]
        losses[0].backward()
        losses[1].backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        found.append((losses[1].item(), gradients))
    assert 3 in sizes
    assert_same(found[1], found[0])


def attention_of(model) -> Any:
    return next(each for each in model.modules() if hasattr(each, "q_proj"))


@pytest.fixture
def two():
    """PEFT's attention layers and ours, and one input."""
    model = adapted()
    return SimpleNamespace(
        peft=attention_of(model), ours=attention_of(ours(model)), x=torch.randn(2, 3, 32, requires_grad=True)
    )


def assert_each(two, order=QKV, x=None, sizes=None, expected_sizes=None):
    """Each layer's output is PEFT's."""
    for name in order:
        given = two.x if x is None else x
        torch.testing.assert_close(getattr(two.ours, name)(given), getattr(two.peft, name)(given))
    assert sizes is None or sizes == expected_sizes


@pytest.mark.parametrize("order", [QKV, ("v_proj", "q_proj", "k_proj"), ("k_proj", "v_proj", "q_proj")])
def test_in_any_order(two, order, sizes):
    assert_each(two, order, sizes=sizes, expected_sizes=[3])
    assert_each(two, order, x=two.x * 2, sizes=sizes, expected_sizes=[3, 3])


def test_another_input_gets_its_own_output_and_from_then_on_each_computes_alone(two, sizes):
    other = (two.x * 2).detach()
    torch.testing.assert_close(two.ours.q_proj(two.x), two.peft.q_proj(two.x))
    torch.testing.assert_close(two.ours.k_proj(other), two.peft.k_proj(other))
    torch.testing.assert_close(two.ours.v_proj(two.x), two.peft.v_proj(two.x))
    assert sizes == [3, 1, 1]
    sizes.clear()
    assert_each(two, sizes=sizes, expected_sizes=[1, 1, 1])


def test_an_output_nobody_came_for_is_not_made_again(two, sizes):
    two.ours.q_proj(two.x)
    assert_each(two, x=two.x * 2, sizes=sizes, expected_sizes=[3, 1, 1, 1])


def test_an_output_is_handed_out_once(two, sizes):
    first = two.ours.k_proj(two.x)
    two.ours.q_proj(two.x)
    assert two.ours.k_proj(two.x) is not first
    assert sizes[0] == 3


def test_an_input_changed_in_place_is_another(two):
    x = two.x.detach().clone()
    two.ours.q_proj(x)
    x.mul_(3)
    torch.testing.assert_close(two.ours.k_proj(x), two.peft.k_proj(x))


def changed_in_place(layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3)


def replaced(layer):
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.detach() * 3)


def rescaled(layer):
    layer.scaling["default"] *= 3


def disabled(layer):
    layer.enable_adapters(False)


def merged(layer):
    layer.merge()


@pytest.mark.parametrize("change", [changed_in_place, replaced, rescaled, disabled, merged])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_layer_that_is_not_as_it_was_gets_its_own_output(two, change, when):
    if when == "between":
        two.ours.q_proj(two.x)
    for each in (two.ours, two.peft):
        change(each.k_proj)
    assert_each(two, ("k_proj", "q_proj", "v_proj") if when == "between" else QKV)


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"])
def test_a_layer_with_hooks_computes_by_itself(two, hook, sizes):
    called = []
    getattr(two.ours.k_proj, hook)(lambda *_: called.append(hook))
    outputs = [getattr(two.ours, name)(two.x) for name in QKV]
    sum(each.sum() for each in outputs).backward()
    assert called == [hook]
    assert sorted(sizes) == [1, 2]


def test_without_gradients_each_computes_by_itself(two, sizes):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_each(two, x=two.x.detach().clone())
    assert set(sizes) == {1}


def test_generation_with_a_cache_says_the_same():
    model = adapted(build={"use_cache": True}).eval()
    tokens = tiny_inputs("qwen3_moe")["input_ids"]
    how = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(ours(model).generate(input_ids=tokens, **how), model.generate(input_ids=tokens, **how))


def test_with_adapters_off_and_on_and_two_of_them(sizes):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model, seed=9, only="lora_")
    found: Any = ours(model)
    inputs = tiny_inputs("qwen3_moe")

    def both(expected_sizes):
        """Each is off by up to 8e-6 from fp64, the one on one CPU and the other on the next."""
        sizes.clear()
        assert_same(training(found, "qwen3_moe"), training(model, "qwen3_moe"), 2 * TOLERANCE)
        assert set(sizes) == expected_sizes

    both({3, 1})
    with found.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(tiny_loss(found, inputs), tiny_loss(model, inputs))
    for each in (found, model):
        each.set_adapter("other")
    both({2})
    for each in (found, model):
        each.base_model.set_adapter(["default", "other"])
    both({1})  # k and o have one of them
    for each in (found, model):
        each.base_model.set_adapter("default")
    both({3, 1})
    for each in (found, model):
        each.merge_adapter()
    torch.testing.assert_close(tiny_loss(found, inputs), tiny_loss(model, inputs))
    for each in (found, model):
        each.unmerge_adapter()
    sizes.clear()
    tiny_loss(found, inputs)
    assert set(sizes) == {3, 1}


def test_copies_and_pickles_compute_alone_until_they_are_installed(two, sizes):
    for copied in (copy.deepcopy(two.ours.q_proj), pickle.loads(pickle.dumps(two.ours.q_proj))):
        sizes.clear()
        assert getattr(copied, ATTRIBUTE) is not getattr(two.ours.q_proj, ATTRIBUTE)
        torch.testing.assert_close(copied(two.x), two.peft.q_proj(two.x))
        assert sizes == [1]
    whole = copy.deepcopy(two.ours)
    lora.install(whole)
    sizes.clear()
    two.ours = whole
    assert_each(two, sizes=sizes, expected_sizes=[3])


class Reads(nn.Module):
    def forward(self: Any, x, y):
        a, b = self.one(x), self.two(x)
        c = self.three(y)
        x = a + b + c
        return self.four(x)


class Sets(nn.Module):
    def forward(self: Any, x):
        x = self.one(x)
        return self.two(x)


class Twice(nn.Module):
    def forward(self: Any, x):
        return self.one(x) + self.two(x) + self.one(x)


def test_which_layers_are_called_with_the_same_variable():
    names = ("one", "two", "three", "four")
    assert called_alike(Reads, names) == ()  # `four` is called with the x that was set since
    assert called_alike(Reads, names[:3]) == (("one", "two"),)
    assert called_alike(Sets, names) == ()
    assert called_alike(Twice, names) == ()
    assert called_alike(nn.Module, names) == ()
