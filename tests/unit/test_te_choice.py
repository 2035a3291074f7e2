"""Asking for `te_parts`: what is refused, what a model can have of it, and what is said."""

import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from moe_accel import MoEConfig, block, doctor, engine, plugin
from moe_accel.config import TE_PARTS, MoEOptions
from moe_accel.errors import ConfigError, DependencyError
from moe_accel.kernels import te, te_fp8, te_parts
from moe_accel.report import Choice
from tests.fake_transformer_engine import CALLS
from tests.families import build_tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


MODELS = {"bf16": BF16, "fp32": torch.float32}
FP32 = "the model is in fp32, of which TransformerEngine computes nothing outside of autocast"
COMPILED = "norms, fp8 not by TransformerEngine: torch.compile is to compile the model"
NORMS = "9 of 9 norms not by TransformerEngine: their weights are in fp32"


@pytest.mark.parametrize(
    ("dtype", "computed", "taken", "said"),
    [
        ("bf16", engine.Computed(), ["norms", "fp8"], []),
        ("fp32", engine.Computed(), ["fp8"], [FP32, NORMS]),
        ("fp32", engine.Computed("bf16"), ["fp8"], [NORMS]),
        ("fp32", engine.Computed("bf16", by_fsdp2=True), ["norms", "fp8"], []),
        ("bf16", engine.Computed("bf16"), ["norms", "fp8"], []),
        ("bf16", engine.Computed(compiled=True), [], [COMPILED]),
    ],
)
def test_what_a_model_cannot_have_is_not_claimed(dtype, computed, taken, said):
    model = build_tiny("qwen3_moe", MODELS[dtype])
    assert engine.choose(model, ["norms", "fp8"], computed) == (taken, said)
    assert engine.choose(model, ["experts", "norms", "fp8"], computed) == (["experts", *taken], said)


def test_norms_in_fp32_among_others_are_counted():
    model = build_tiny("qwen3_moe", BF16)
    model.model.norm.float()
    said = "1 of 9 norms not by TransformerEngine: their weights are in fp32"
    assert engine.choose(model, ["norms"], engine.Computed()) == (["norms"], [said])


@pytest.mark.parametrize(("parts", "compiles"), [(["fp8"], False), (["norms", "fp8"], False), (["norms"], True)])
def test_norms_are_theirs_where_asked_for_and_kernels_are_fused_where_nothing_is_left(
    package, new_accelerate_state, parts, compiles
):
    asked = []

    def install(model, device, precision, of_model):
        asked.append("norms" in of_model)
        return Choice("native", "no GPU")

    package.setattr(block, "install", install)
    package.setattr(te_parts, "check", lambda device, names: None)
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig(kernels="te", te_parts=parts))
    model = build_tiny("qwen3_moe", BF16)
    accelerator.prepare(torch.compile(model) if compiles else model)
    (report,) = plugin.reports(accelerator)
    assert asked == ["norms" in parts and not compiles]
    assert report.kernels.value == ("fused" if compiles else "te")


def test_norms_without_weights_and_models_of_norms_alone_are_nothing_special():
    class RMSNorm(nn.Module):
        pass

    bare = nn.Sequential(RMSNorm(), nn.Linear(2, 2, dtype=BF16))
    assert engine.choose(bare, ["norms"], engine.Computed("bf16")) == (["norms"], [])
    assert engine.choose(build_tiny("gemma4", BF16), ["norms"], engine.Computed("bf16")) == (["norms"], [])


@pytest.mark.parametrize("dtype", MODELS)
def test_prepared_a_model_has_what_was_asked_for(package, new_accelerate_state, dtype):
    package.setattr(te_parts, "check", lambda device, names: None)
    package.setattr(te_fp8, "WORTH", 0)
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig(kernels="te", te_parts=list(TE_PARTS)))
    model = build_tiny("qwen3_moe", MODELS[dtype])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    index = torch.arange(32).view(2, 16)
    model(input_ids=index, labels=index).loss.backward()
    optimizer.step()
    (report,) = plugin.reports(accelerator)
    assert report.kernels.value == "te"
    if dtype == "fp32":
        assert report.notes[:2] == (FP32.replace("nothing", "nothing but routers"), NORMS)
        assert "RMSNorm" not in report.kernels.reason
        assert not CALLS
    else:
        assert "RMSNorm" in report.kernels.reason
        attends = "attention by TransformerEngine in 2 of the layers, where it is causal and without dropout"
        assert report.notes == (attends, "8 of 8 linear layers in FP8: those of 0 weights and more")
        assert set(CALLS) >= {"TN", "NN", "NT", "permute", "unpermute", "bshd", "fp8 TN", "fp8 NN", "fp8 NT"}


def test_the_parts_are_those_of_the_config():
    assert tuple(te_parts.PARTS) == TE_PARTS


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({"kernels": "te", "te_parts": list(TE_PARTS)}, []),
        ({"kernels": "te", "te_parts": "norms"}, ["te_parts='norms' must be a list of some of {parts}"]),
        ({"kernels": "te", "te_parts": []}, ["te_parts=[] must be a list of some of {parts}"]),
        ({"kernels": "te", "te_parts": None}, ["te_parts=None must be a list of some of {parts}"]),
        (
            {"kernels": "te", "te_parts": ["norm", 9]},
            [
                "te_parts has 'norm', which must be one of {parts} (did you mean 'norms'?)",
                "te_parts has 9, which must be one of {parts}",
            ],
        ),
        ({"kernels": "te", "te_parts": ["fp8", "fp8"]}, ["te_parts=['fp8', 'fp8'] names one twice"]),
        ({"te_parts": ["fp8"]}, ["te_parts=['fp8'] needs kernels: te, not 'auto'"]),
    ],
)
def test_parts_are_a_list_of_known_words_under_kernels_te(options, problems):
    found = MoEOptions(**options).problems()
    assert found == [each.format(parts=", ".join(TE_PARTS)) for each in problems]


def test_what_is_chosen_is_told(package):
    for name in TE_PARTS:
        package.setitem(te_parts.PARTS, name, te_parts.PARTS[name]._replace(tried=lambda device: None))
    chosen = plugin.choose_kernels("te", GPU, ["fp8", "norms"])
    by = "by TransformerEngine 2.20.2, all else as fused"
    assert str(chosen) == f"te (asked for: RMSNorm and large linear layers in FP8 {by})"
    all_of_them = (
        "grouped GEMMs of the experts, permutation of tokens, router, RMSNorm, attention and large linear layers"
    )
    all_of_them += " in FP8"
    waits = "; waits once a layer for the experts' row counts"
    assert str(plugin.choose_kernels("te", GPU, TE_PARTS)) == f"te (asked for: {all_of_them} {by}{waits})"


@pytest.mark.parametrize("name", [name for name in TE_PARTS if name != "experts"])
def test_each_part_is_tried_and_a_wrong_one_refused(package, name):
    assert te_parts.PARTS[name].tried(CPU) is None
    package.setitem(te_parts.PARTS, name, te_parts.PARTS[name]._replace(tried=lambda device: "it is off by 99%"))
    with pytest.raises(DependencyError) as refused:
        te_parts.check(GPU, [name])
    assert refused.value.message == f"kernels=te with {name} in te_parts cannot be used: it is off by 99%"
    assert refused.value.hint == "kernels: auto; moe-accel doctor says more"


def test_fp8_needs_a_gpu_that_has_it(package):
    package.setattr(te, "capability", lambda device: (8, 0))
    with pytest.raises(ConfigError) as refused:
        te_parts.check(GPU, ["fp8", "norms"])
    why = "it needs a GPU with FP8 (compute capability 8.9 or more), and this one has 8.0"
    assert refused.value.message == f"kernels=te with fp8 in te_parts cannot be used: {why}"
    assert refused.value.hint == "te_parts: [norms]"


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("permutation", "transformer_engine.pytorch.triton.permutation", "unpermute_with_mask_map"),
        ("router", "transformer_engine.pytorch.router", "fused_topk_with_score_function"),
        ("norms", "transformer_engine_torch", "rmsnorm_bwd"),
        ("attention", "transformer_engine.pytorch", "DotProductAttention"),
        ("fp8", "transformer_engine.pytorch.quantized_tensor", "prepare_for_saving"),
    ],
)
def test_a_version_without_a_function_is_named(package, name, module, function):
    package.delattr(sys.modules[module], function)
    assert te_parts.problem(GPU, name) == f"transformer_engine 2.20.2 has no {function}"
    package.setattr(doctor, "_device", lambda: GPU)
    (part,) = doctor._transformer_engine()
    others = ", ".join(each for each in TE_PARTS if each != name)
    whole = f"kernels: te, te_parts: [{others}]; and its FusedAdam with any Trainer or loop"
    assert part.what == f"{whole}; not {name}: transformer_engine 2.20.2 has no {function}"
