"""The config that reaches a family's experts, and configs that do not: told or refused."""

import copy

import pytest
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model

from moe_accel import MoEConfig, expert_lora_config, experts, plugin
from moe_accel.errors import UnsupportedModelError
from moe_accel.report import short
from tests.families import available_families, build_tiny, experts_modules
from tests.unit.expert_adapters import RANK, TOLERANCE, adapted, assert_same, prepared, training

LANGUAGE = available_families()


pytestmark = pytest.mark.usefixtures("new_accelerate_state")


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
    # 4: as in test_expert_lora; beside fp64, PEFT's own gradient of the router is off by 1.6e-5 and ours by 0.2e-5
    assert_same(training(prepared(model), "qwen3_moe"), training(model, "qwen3_moe"), 4 * TOLERANCE)


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
