"""The test material covers what the installed transformers has, and is worth testing with."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from tests.families import (
    available_families,
    build_tiny,
    decorated_classes,
    experts_modules,
    model_class,
    tiny_inputs,
    tiny_loss,
)
from tests.family_data import EXPERTS, FAMILIES

MAIN_MATRIX = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "nemotron_h", "qwen3_next"]
MAIN_MATRIX += ["qwen3_5_moe", "olmoe", "granitemoe"]
UNDECORATED = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}


@pytest.mark.parametrize("folder", sorted(decorated_classes()))
def test_every_decorated_class_is_in_a_tiny_model(folder):
    families = [name for name in available_families() if (FAMILIES[name].folder or name) == folder]
    assert families, f"transformers has experts in models/{folder}: add the family to tests/family_data.py"
    built = {type(module).__name__ for name in families for _, module in experts_modules(build_tiny(name))}
    assert built == set(decorated_classes()[folder])


def test_a_family_is_left_out_only_if_transformers_lacks_or_does_not_decorate_it():
    folders = {path.parent.name for path in Path(transformers.__path__[0], "models").glob("*/modeling_*.py")}
    left_out = {FAMILIES[name].folder or name for name in set(FAMILIES) - set(available_families())}
    assert left_out & folders - {"aria"} == UNDECORATED  # aria: decorated from 5.23 on


@pytest.mark.parametrize("family", available_families())
def test_the_same_seed_gives_the_same_model_and_its_weights_are_worth_testing_with(family):
    model, again, other = build_tiny(family), build_tiny(family), build_tiny(family, seed=1)
    for name, module in experts_modules(model):
        for key, parameter in module.named_parameters():
            assert parameter.isfinite().all()
            assert 0.05 < parameter.std() < 2.0, f"{name}.{key}"
    for (name, one), two, three in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.numel() < 4 or not torch.equal(one, three), name


@pytest.mark.parametrize("family", available_families())
def test_the_loss_reaches_every_stack_of_experts(family):
    model = build_tiny(family)
    loss = tiny_loss(model, tiny_inputs(family))
    loss.backward()
    assert loss.isfinite()
    for name, module in experts_modules(model):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            if parameter.shape[0] == module.num_experts:
                assert (parameter.grad.flatten(1).abs().amax(dim=1) > 0).sum() >= 2, f"{name}.{key}"


@pytest.mark.parametrize("family", MAIN_MATRIX)
def test_the_families_of_the_main_matrix_are_causal_lms_that_four_ranks_can_share(family):
    assert re.search("ForCausalLM$", model_class(family).__name__)
    model = build_tiny(family)
    inputs = tiny_inputs(family)
    assert set(inputs) == {"input_ids", "labels"}
    assert model(**inputs).loss.requires_grad
    modules = dict(experts_modules(model))
    assert len(modules) == 2
    assert {module.num_experts for module in modules.values()} == {EXPERTS}
    assert EXPERTS % 4 == 0
