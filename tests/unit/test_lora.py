"""LoRA on linear layers in one function: PEFT's numbers, and PEFT itself wherever it is more than one plain adapter."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_accel import lora
from moe_accel.report import Choice
from moe_accel.swap import own_class
from moe_accel.told import told_of_lora
from tests.families import randomise

TOLERANCE = 90 * torch.finfo(torch.float32).eps  # see tests/dist/parity.py


def test_values_and_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (4, 5), "bias": (4,), "a": (2, 5), "b": (4, 2)}
    given = [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes.values()
    ]

    def computed(x, *part):
        return lora.lora_linears(x, [lora.Part(*part, 1.5)])[0]

    assert torch.autograd.gradcheck(computed, given)
    x, weight, bias, a, b = given
    torch.testing.assert_close(computed(*given), x @ weight.T + bias + 1.5 * (x @ a.T @ b.T))


def layer(bias=True, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(6, 5, bias=bias)})
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["linear"], **options))
    randomise(model, seed=3)
    return model


def both(model, change=lambda _model: None, autocast=False, dtype=torch.float32):
    """Output and gradients, by PEFT and by us; and whether ours was used."""
    found = []
    used = []
    original = lora.lora_linears
    for ours in (False, True):
        each = copy.deepcopy(model)
        if ours:
            lora.install(each)
        change(each)
        x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        torch.manual_seed(5)  # of dropout
        lora.lora_linears = lambda *args: (used.append(1), original(*args))[1]
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = each.base_model.model["linear"](x)
        finally:
            lora.lora_linears = original
        output.float().square().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        found.append({"output": output.detach(), "x": x.grad, **gradients})
    return *found, bool(used)


def assert_same(peft, ours, tolerance=TOLERANCE):
    assert ours.keys() == peft.keys()
    for name, expected in peft.items():
        assert ours[name].dtype == expected.dtype, name
        assert (ours[name] - expected).abs().max() <= tolerance * expected.abs().max(), name


def train_everything(model):
    model.requires_grad_(True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("change", [lambda _model: None, train_everything], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_one_adapter_has_pefts_numbers(bias, change, options):
    peft, ours, used = both(layer(bias, **options), change)
    assert used
    assert_same(peft, ours)


def test_under_autocast_too_within_bf16():
    peft, ours, used = both(layer(), autocast=True)
    assert used
    assert_same(peft, ours, 8 * 2**-9)


def in_bf16(bias=True, **options):
    """A bf16 layer with what PEFT makes of its adapters by default: fp32."""
    model = layer(bias, **options)
    model.base_model.model["linear"].base_layer.bfloat16()
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_fp32_adapters_of_a_bf16_layer_are_multiplied_in_bf16_with_gradients_in_fp32(bias):
    peft, ours, used = both(in_bf16(bias), dtype=torch.bfloat16)
    assert used
    gradients = {name: each.dtype for name, each in ours.items() if "lora_" in name}
    assert gradients == dict.fromkeys(gradients, torch.float32)
    assert len(gradients) == 2
    assert_same(peft, ours, 8 * 2**-9)


def test_an_update_below_bf16s_last_place_is_kept_in_fp32_adapters():
    model = in_bf16()
    lora.install(model)
    weight = model.base_model.model["linear"].lora_B["default"].weight
    before = weight.detach().clone()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    model.base_model.model["linear"](x).float().sum().backward()
    torch.optim.SGD([weight], lr=1e-6).step()
    moved = (weight.detach() - before).abs() < before.abs() * 2**-9
    assert moved.all()
    assert not torch.equal(weight.detach(), before)


def add_second(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])


DOUBLED = {
    "register_forward_hook": lambda _module, _inputs, output: output * 2,
    "register_forward_pre_hook": lambda _module, inputs: (inputs[0] * 2,),
    "register_full_backward_hook": lambda _module, inputs, _outputs: (inputs[0] * 2,),
    "register_full_backward_pre_hook": lambda _module, outputs: (outputs[0] * 2,),
}


def hooked(how, part=lambda layer: layer.base_layer):
    return lambda model: getattr(part(model.base_model.model["linear"]), how)(DOUBLED[how])


def accelerate_hooked(model):
    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    add_hook_to_module(model.base_model.model["linear"].lora_B["default"], Doubled())


STEPS_ASIDE = {
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "two": ({}, add_second),
    "dropout": ({"lora_dropout": 0.5}, lambda _model: None),
    "dora": ({"use_dora": True}, lambda _model: None),
    "biased": ({"lora_bias": True}, lambda _model: None),
    "hooked": ({}, hooked("register_forward_hook")),
    "pre-hooked": ({}, hooked("register_forward_pre_hook")),
    "backward-hooked": ({}, hooked("register_full_backward_hook")),
    "backward-pre-hooked": ({}, hooked("register_full_backward_pre_hook")),
    "dropout-hooked": ({}, hooked("register_forward_hook", lambda layer: layer.lora_dropout["default"])),
    "accelerate-hooked": ({}, accelerate_hooked),
}


@pytest.mark.parametrize(("options", "change"), STEPS_ASIDE.values(), ids=STEPS_ASIDE)
def test_whatever_is_more_stays_with_peft(options, change):
    def seeded(model):
        torch.manual_seed(2)  # of the second adapter
        change(model)

    peft, ours, used = both(layer(**options), seeded)
    assert not used
    assert_same(peft, ours, 0)


@pytest.mark.parametrize("how", ["register_module_forward_hook", "register_module_full_backward_hook"])
def test_with_hooks_on_all_modules_of_the_process_it_stays_with_peft(how):
    calls = []
    handle = getattr(nn.modules.module, how)(lambda module, *_args: calls.append(type(module).__name__))
    try:
        _, _, used = both(layer())
    finally:
        handle.remove()
    assert not used
    assert calls.count("Linear") == 2 * 4  # LoRA's own Linear, its base layer, A and B; by PEFT and by us


def test_dropout_that_is_off_is_none():
    _, _, used = both(layer(lora_dropout=0.5), lambda model: model.eval())
    assert used


SAID = {
    "plain": ({}, (1, {})),
    "dropout": ({"lora_dropout": 0.05}, (0, {"lora_dropout": 1})),
    "dora": ({"use_dora": True}, (0, {"DoraLinearVariant": 1})),
    "biased": ({"lora_bias": True}, (0, {"lora_bias": 1})),
}


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("options", "said"), SAID.values(), ids=SAID)
def test_what_is_said_is_what_happens_in_training(options, said, mode):
    """Whatever mode the model is in when it is prepared."""
    model = layer(**options).train(mode)
    assert lora.install(copy.deepcopy(model)) == said
    *_, used = both(model.train())
    assert used == bool(said[0])


def test_dtypes_that_are_multiplied_by_peft_are_said():
    model = layer()
    model.base_model.model["linear"].base_layer.half()
    assert lora.install(model) == (0, {"adapters in float32 on weights in float16": 1})
    assert lora.install(model, autocasts=True) == (1, {})
    linear, x = model.base_model.model["linear"], torch.randn(2, 6).half()
    assert torch.equal(linear(x), own_class(linear).forward(linear, x))


def test_two_active_adapters_are_said():
    model = layer()
    add_second(model)
    assert lora.install(model) == (0, {"2 active adapters": 1})
    model.base_model.set_adapter("second")
    assert lora.install(model) == (1, {})


def test_the_report_names_what_stays_with_peft():
    kernels = Choice("fused", "asked for")
    said = told_of_lora(kernels, layer(lora_dropout=0.05), "no")
    assert said == ["LoRA on 1 linear layers computed by PEFT in training: lora_dropout"]
    plain = "LoRA on 1 linear layers added into their products"
    assert told_of_lora(kernels, layer(), "no") == [plain]
    assert told_of_lora(Choice("reference", "asked for"), layer(), "no") == []
    rounded = f"{plain}, 1 with fp32 adapters multiplied in bf16"
    assert told_of_lora(kernels, in_bf16(), "no") == [rounded]
    assert told_of_lora(kernels, in_bf16(), "bf16") == [plain], "as autocast does"
