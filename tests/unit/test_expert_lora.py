"""LoRA on experts, without weights that hold it: PEFT's own numbers, files and switches, in every family."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from moe_accel import MoEConfig, expert_lora_config, experts, plugin
from moe_accel.errors import UnsupportedModelError
from moe_accel.experts.adapters import factors
from moe_accel.report import short
from moe_accel.swap import own_class
from tests.families import available_families, build_tiny, experts_modules, randomise, tiny_inputs, tiny_loss

TOLERANCE = 90 * torch.finfo(torch.float32).eps  # see tests/dist/parity.py
RANK = 3  # no multiple of 8: padded where kernels want whole 16 bytes

LANGUAGE = available_families()


pytestmark = pytest.mark.usefixtures("new_accelerate_state")


def adapted(family="qwen3_moe", dtype=torch.float32, build=None, **options):
    """A tiny model with noise for adapters, in PEFT's hands."""
    model = build_tiny(family, dtype, **(build or {}))
    config = expert_lora_config(model, r=RANK, **options)
    model = get_peft_model(model, config)
    randomise(model, seed=7, only="lora_")
    return model


def prepared(model, kernels="auto"):
    model = copy.deepcopy(model)
    return Accelerator(parallelism_config=MoEConfig(kernels=kernels)).prepare(model)


def training(model, family):
    """Loss, and gradient of every parameter that has one."""
    loss = tiny_loss(model, tiny_inputs(family))
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same(found, expected, tolerance=TOLERANCE):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(gradient.abs().max().item(), 1e-30)
        assert (found[1][name] - gradient).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("family", LANGUAGE)
def test_losses_and_gradients_are_those_of_peft(family):
    model = adapted(family)
    expected = training(model, family)
    assert any("experts" in name for name in expected[1])
    assert all("lora_" in name for name in expected[1])
    # twice: a looped family (inkling2_loop) passes through its layers more than once, others have three
    assert_same(training(prepared(model), family), expected, 2 * TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_fp32_adapters_of_a_bf16_model_have_fp32_gradients_as_near_to_fp64_as_pefts(family):
    """PEFT's default for a bf16 model (`autocast_adapter_dtype`)."""
    model = adapted(family, torch.bfloat16)
    wrapper = next(each for each in model.modules() if type(each).__name__ == "ParamWrapper")
    ours = next(each for each in prepared(model).modules() if type(each).__name__ == "ParamWrapper")
    exact = copy.deepcopy(wrapper).double()
    exact.get_base_layer().config._experts_implementation = "eager"  # the others take no fp64
    width = next(model.get_base_model().modules()).config.hidden_size
    generator = torch.Generator().manual_seed(0)
    x, given = torch.randn(2, 60, width, generator=generator).bfloat16()
    choices = torch.randn(60, 8, generator=generator).topk(2).indices
    weights = torch.rand(60, 2, generator=generator).bfloat16()

    def gradients(how, dtype=torch.bfloat16):
        how(x.to(dtype), choices, weights.to(dtype)).backward(given.to(dtype))
        return {name: each.grad for name, each in how.named_parameters() if each.grad is not None}

    found, pefts, truth = gradients(ours), gradients(wrapper), gradients(exact, torch.float64)
    assert found.keys() == pefts.keys() == truth.keys()
    for name, expected in truth.items():
        assert found[name].dtype == torch.float32, name
        errors = [((of[name] - expected).norm() / expected.norm()).item() for of in (found, pefts)]
        assert errors[0] < 1.1 * errors[1] < 0.02, (name, errors)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_reference_kernels_give_the_same(family):
    model = adapted(family)
    assert_same(training(prepared(model, "reference"), family), training(model, family))


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_projection_alone_may_have_adapters(family, targets):
    model = build_tiny(family)
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=[f"mlp.experts.{each}" for each in targets])
    model = get_peft_model(model, config)
    randomise(model, seed=7, only="lora_")
    assert_same(training(prepared(model), family), training(model, family))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # PEFT looks for them among modules only
@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"gate_up_proj": 7}}],
    ids=["rslora", "patterns"],
)
def test_scaling_and_ranks_are_pefts(options):
    model = adapted(**options)
    assert_same(training(prepared(model), "qwen3_moe"), training(model, "qwen3_moe"))


def test_experts_without_tokens_get_zeros():
    model = adapted(build={"num_experts_per_tok": 1})
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.mlp.gate.weight.zero_()  # all tokens to one expert
    ours = prepared(model)
    found = training(ours, "qwen3_moe")
    assert_same(found, training(model, "qwen3_moe"))
    of_a = next(each for name, each in found[1].items() if "experts.lora_A" in name).view(8, RANK, -1)
    assert sum(bool(each.any()) for each in of_a) == 1


def two_adapters():
    model = adapted(attention=False)
    model.add_adapter("second", LoraConfig(r=5, target_modules=[], target_parameters=_targets(model)))
    randomise(model, seed=9, only="second")
    return model


def _targets(model):
    return list(model.peft_config["default"].target_parameters)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids=str)
def test_several_adapters_are_switched_as_in_peft(active):
    model = two_adapters()
    ours = prepared(model)
    for each in (model, ours):
        each.base_model.set_adapter(active)
    expected = training(model, "qwen3_moe")
    assert {name.split(".")[-2] for name in expected[1]} == set(active)
    assert_same(training(ours, "qwen3_moe"), expected)


def test_disabled_and_merged_adapters_are_as_in_peft():
    model = adapted()
    ours = prepared(model)
    inputs = tiny_inputs("qwen3_moe")
    with torch.no_grad():
        with_them = ours(**inputs).logits
        for each in (model, ours):
            with each.disable_adapter():
                each.without = each(**inputs).logits
        torch.testing.assert_close(ours.without, model.without)
        assert not torch.allclose(ours.without, with_them)
        ours.merge_adapter()
        torch.testing.assert_close(ours(**inputs).logits, with_them)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(**inputs).logits, with_them)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    model = adapted()
    ours = prepared(model)
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    expected = training(model, "qwen3_moe")
    assert_same(training(ours, "qwen3_moe"), expected)


def test_no_weight_with_an_adapter_in_it_is_built(monkeypatch):
    """Nor is any gradient of the size of the experts: what is kept for backward is small."""
    model = adapted()
    ours = prepared(model)

    def refuse(*_arguments, **_options):
        raise AssertionError("a weight was parametrized")

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
    kept: dict[int, torch.Tensor] = {}
    weights = {each.untyped_storage().data_ptr() for each in ours.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = tiny_loss(ours, tiny_inputs("qwen3_moe", 1, 2))
    largest = max(each.untyped_storage().nbytes() for each in kept.values())
    experts_bytes = next(module for _, module in experts_modules(ours)).gate_up_proj.nbytes
    loss.backward()
    assert largest < experts_bytes / 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_smaller_than_the_weights_rounding_still_counts(family):
    """In bf16, W + BA rounds to W where BA is below half a unit in its last place; so does y + dy. Not here.

    Gain: how much of the adapter's effect in fp32 is found in the bf16 output; 1 is all of it.
    """
    torch.manual_seed(0)
    model = adapted(family, torch.bfloat16)
    _, module = next(experts_modules(model))
    experts.install(module, experts.Settings("fused"))
    experts.install_adapters(model, [("experts", module)])
    wrapper = next(each for each in model.modules() if type(each).__name__ == "ParamWrapper")
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(2000, width)
    choices = torch.randn(2000, module.num_experts).topk(4).indices
    weights = torch.rand(2000, 4)

    def effect(how, dtype):
        """Change of the output by adapters of 1/1000 of the weights."""
        how = how.to(dtype)
        with torch.no_grad():
            outputs = []
            for scale in (0.0, 1.0):
                for part in (how, how.base_layer):
                    part.scaling["default"] = 1e-3 * scale
                outputs.append(how(x.to(dtype), choices, weights.to(dtype)).double())
        return outputs[1] - outputs[0]

    exact = copy.deepcopy(wrapper)
    for part in (exact, exact.base_layer):
        part.__class__ = own_class(part)
    exact.get_base_layer().config._experts_implementation = "eager"
    pefts = copy.deepcopy(exact)
    truth = effect(exact, torch.float64)
    gain = {name: (effect(how, torch.bfloat16) * truth).sum() / (truth**2).sum() for name, how in
            (("ours", wrapper), ("peft", pefts))}  # fmt: skip
    assert gain["peft"] < 0.8
    assert 0.85 < gain["ours"] < 1.15


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_saved_adapters_are_the_files_that_peft_writes_and_load_there(family, tmp_path):
    model = adapted(family)
    ours = prepared(model)
    for name, each in (("peft", model), ("ours", ours)):
        each.save_pretrained(tmp_path / name)
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    plain = PeftModel.from_pretrained(build_tiny(family), tmp_path / "ours")
    inputs = tiny_inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs).logits, plain.eval()(**inputs).logits)


@pytest.mark.parametrize("family", LANGUAGE)
def test_the_config_for_a_family_reaches_every_expert_and_no_router(family):
    model = adapted(family)
    found = experts.find_experts(model)
    told = experts.told_of_adapters(model, found, experts.install_adapters(model, found))
    assert f"experts of {len(found)} of {len(found)} layers" in told[0]
    parents = {name.rpartition(".")[0]: module.num_experts for name, module in found}
    beside = {
        name: each.get_base_layer()
        for name, each in model.named_modules()
        if hasattr(each, "lora_A") and any(name.replace(".base_layer", "").startswith(parent) for parent in parents)
    }
    of_routers = [name for name, each in beside.items() if ".gate." in f"{name}." or ".router" in name]
    assert not of_routers
    names = [name for name, each in model.named_parameters() if "lora_A" in name and "experts" not in name]
    assert names, "nothing of attention is adapted"


def test_the_router_is_adapted_where_it_is_asked_for():
    model = adapted(router=True)
    assert any("mlp.gate" in name for name, _ in model.named_parameters() if "lora_A" in name)
    assert_same(training(prepared(model), "qwen3_moe"), training(model, "qwen3_moe"))


def test_the_config_is_refused_where_nothing_is_left():
    with pytest.raises(UnsupportedModelError, match="nothing of what was asked for can have an adapter"):
        expert_lora_config(build_tiny("qwen3_moe"), experts=False, attention=False)


def swap(model):
    return plugin.swap_all(Accelerator(parallelism_config=MoEConfig()), [model])


def test_the_report_says_what_is_adapted(capsys):
    swap(adapted(attention=False))
    assert (
        "note        LoRA on 8 experts of 2 of 2 layers: down_proj r 3, gate_up_proj r 3; " in capsys.readouterr().err
    )


def test_the_report_says_that_experts_have_none(capsys):
    swap(adapted(experts=False))
    assert (
        "note        no adapter on the routed experts; moe_accel.expert_lora_config(model)" in capsys.readouterr().err
    )


def test_experts_of_modules_to_save_are_counted_once(capsys):
    """PEFT keeps what it copied; with two such adapters there are three of each."""
    config = LoraConfig(r=RANK, target_modules=["q_proj"], modules_to_save=["experts"])
    plain = build_tiny("qwen3_moe")
    num_layers, num = 2, sum(each.numel() for _, module in experts_modules(plain) for each in module.parameters())
    model = get_peft_model(plain, config)
    model.add_adapter("second", config)
    swap(model)
    said = capsys.readouterr().err
    assert f"experts     {num_layers} of {num_layers} layers of Qwen3MoeExperts" in said
    assert f"trainable   {short(num)} of {short(num)} expert parameters" in said
    assert f"note        the experts of {num_layers} of {num_layers} layers are trained whole: modules_to_save" in said
    assert "no adapter on the routed experts" not in said


def test_target_modules_that_mean_experts_are_refused():
    model = get_peft_model(build_tiny("qwen3_moe"), LoraConfig(target_modules=["q_proj", "experts.0.linear"]))
    with pytest.raises(UnsupportedModelError, match="target_modules names 'experts") as error:
        swap(model)
    assert "expert_lora_config" in (error.value.hint or "")


ATTENTION_ONLY = [
    r"(?!.*experts).*_proj",
    r".*(?<!experts\.)[qkv]_proj",
    r".*_proj",
    r".*(q_proj|shared_experts\.up_proj)",
]
ASK_FOR_EXPERTS = {
    "per-expert": r".*(q_proj|experts\.\d+\.(gate|up|down)_proj)",
    "stacked": r".*(self_attn\.q_proj|mlp\.experts\.gate_up_proj)",
    "shared-too": r".*(q_proj|shared_experts\.up_proj|\bexperts\.down_proj)",
    "one-layer": r".*(q_proj|layers\.1\.mlp\.experts\.\d\.w2)",
    "of-a-list": ["q_proj", "mlp.experts.gate_up_proj"],
    "parameter": ["q_proj", "down_proj"],
}


def with_targets(targets, *parameters, **options):
    """Of gpt_oss, whose patterns PEFT leaves as they are; others' it may turn into last names before we see them."""
    config = LoraConfig(target_modules=targets, target_parameters=list(parameters) or None, **options)
    return get_peft_model(build_tiny("gpt_oss"), config)


@pytest.mark.parametrize("targets", ATTENTION_ONLY)
def test_a_pattern_that_matches_no_expert_may_speak_of_experts(targets, capsys):
    swap(with_targets(targets))
    assert "note        no adapter on the routed experts" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [(), ("mlp.router.weight",)], ids=["alone", "router"])
@pytest.mark.parametrize("targets", ASK_FOR_EXPERTS.values(), ids=ASK_FOR_EXPERTS)
def test_targets_that_match_experts_and_reach_none_are_refused(targets, beside):
    with pytest.raises(UnsupportedModelError, match=r"target_modules names .* has stacked parameters, which"):
        swap(with_targets(targets, *beside))


def test_target_modules_that_match_experts_are_no_error_where_target_parameters_reach_them():
    stacked = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    for targets in ASK_FOR_EXPERTS.values():
        swap(with_targets(targets, *stacked))
    with pytest.raises(UnsupportedModelError, match=r"but model\.layers\.1\.mlp\.experts has"):
        swap(with_targets(ASK_FOR_EXPERTS["one-layer"], stacked[0]))  # w2 is the other one


def test_experts_that_the_config_itself_leaves_out_are_not_asked_for():
    swap(with_targets(ASK_FOR_EXPERTS["per-expert"], exclude_modules=r".*mlp\.experts.*"))


def test_a_pattern_of_which_peft_leaves_a_parameters_name_is_refused():
    model = get_peft_model(build_tiny("qwen3_moe"), LoraConfig(target_modules=ASK_FOR_EXPERTS["stacked"]))
    assert model.peft_config["default"].target_modules == {"q_proj", "gate_up_proj"}
    with pytest.raises(UnsupportedModelError, match="target_modules names 'gate_up_proj', but"):
        swap(model)


def test_a_target_that_is_no_parameter_is_refused():
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "experts.down"])
    model = get_peft_model(build_tiny("qwen3_moe"), config)
    with pytest.raises(UnsupportedModelError, match="target_parameters names 'experts"):
        swap(model)


def test_adapters_that_were_loaded_frozen_are_refused_beside_trained_parameters(tmp_path):
    adapted(attention=False).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_tiny("qwen3_moe"), tmp_path)
    swap(copy.deepcopy(model))  # for inference
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="its adapters are frozen") as error:
        swap(model)
    assert "is_trainable=True" in (error.value.hint or "")


def test_a_part_of_the_experts_is_a_view_of_pefts_parameters():
    """With ep 2 a rank multiplies by its own experts' factors; their gradients count double, as all ranks average."""
    model = adapted(attention=False)
    _, module = next(experts_modules(model))
    experts.install_adapters(model, [("experts", module)])
    wrapper = model.get_base_model().model.layers[0].mlp.experts
    with wrapper._activate_lora(["default"]):
        whole, part = factors(module, "down_proj", 0, 1), factors(module, "down_proj", 1, 2)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[4:], other)
    delta = wrapper.get_delta_weight("default")
    torch.testing.assert_close((whole[0] @ whole[1]).transpose(1, 2), delta)
    gradients = [torch.autograd.grad(each[0][-1].sum(), wrapper.lora_A["default"].weight)[0] for each in (whole, part)]
    assert torch.equal(2 * gradients[0], gradients[1])
    assert factors(module, "down_proj", 0, 1) is None
