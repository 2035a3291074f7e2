"""`te_parts`: norms, attention and FP8 layers by TransformerEngine's calling contract, or the exact reason why not."""

import copy
import sys

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import AttentionInterface

from moe_accel import MoEConfig, block, doctor, engine, lora, plugin
from moe_accel.config import TE_PARTS, MoEOptions
from moe_accel.errors import ConfigError, DependencyError
from moe_accel.kernels import te, te_attention, te_fp8, te_norm, te_parts
from moe_accel.kernels.rms_norm import rms_norm
from moe_accel.padding import attention
from moe_accel.padding.rows import Rows
from tests import fake_te_parts, fake_transformer_engine
from tests.fake_transformer_engine import CALLS
from tests.families import build_tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def package(monkeypatch):
    """The fake, on a Hopper as far as anybody asks."""
    fake_transformer_engine.install(monkeypatch)
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))
    monkeypatch.setattr(te, "on_gpu", lambda values: True)
    monkeypatch.setattr(te, "version", lambda: "2.20.2")
    return monkeypatch


def both_ways(function, leaves, gradient):
    leaves = [each.detach().requires_grad_() for each in leaves]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, gradient)]


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- norms


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_that_of_ours(package, offset):
    torch.manual_seed(0)
    x, weight, gradient = (torch.randn(*shape, dtype=BF16) for shape in ((2, 5, 8), (8,), (2, 5, 8)))
    ours = both_ways(lambda x, w: rms_norm(x, w, 1e-6, offset), (x, weight), gradient)
    found = both_ways(lambda x, w: te_norm.rms_norm(x, w, 1e-6, offset), (x, weight), gradient)
    assert CALLS == {"norm": 1, "norm backward": 1}
    for one, other in zip(found, ours, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < 0.01


def test_norms_of_fp32_and_of_mixed_dtypes_stay_ours(package):
    for x, weight in ((torch.randn(3, 8), torch.ones(8)), (torch.randn(3, 8, dtype=BF16), torch.ones(8))):
        assert torch.equal(te_norm.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    assert not CALLS


def test_a_models_norms_compute_by_the_function_they_are_given(package):
    model = build_tiny("qwen3_moe", BF16)
    norms = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    package.setattr(block, "use_triton", lambda x: True)
    assert all(block.fuse_norm(each, te_norm.rms_norm) for each in norms)
    model(torch.arange(8)[None])
    assert CALLS["norm"] == len(norms)


# ---- attention


def test_attention_of_rows_is_sdpa_of_them(package):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 16)
    gradient = torch.randn(2, 6, 4, 16)

    def sdpa(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(
            1, 2
        )

    found = both_ways(lambda *qkv: te_attention.attend_rows(*qkv, 0.3), (q, k, v), gradient)
    for one, other in zip(found, both_ways(sdpa, (q, k, v), gradient), strict=True):
        torch.testing.assert_close(one, other)
    assert CALLS == {"bshd": 1}


class Attention(nn.Module):
    """What transformers' attention functions read of a module."""

    num_key_value_groups = 2

    def __init__(self, is_causal=True, by_te=True):
        super().__init__()
        self.is_causal = is_causal
        setattr(self, attention.BY_TE, by_te)


def rows_of(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return Rows(len(lengths), max(lengths), tuple(lengths), bounds, None)


def attended(module, mask=None, length=6, dtype=BF16, **how):
    attention.install()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, dtype=dtype) for heads in (4, 2, 2))
    return AttentionInterface._global_mapping["sdpa"](module, q[:, :, -length:], k, v, mask, scaling=0.3, **how)[0]


def test_causal_attention_of_marked_modules_is_theirs(package):
    assert error(attended(Attention()), attended(Attention(by_te=False))) < 0.01
    assert CALLS == {"bshd": 2}


@pytest.mark.parametrize(
    ("why", "how"),
    [
        ("not causal", {"module": Attention(is_causal=False)}),
        ("asked not to be", {"is_causal": False}),
        ("a mask", {"mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()}),
        ("one token after others", {"length": 1}),
        ("dropout", {"dropout": 0.5}),
        ("fp32", {"dtype": torch.float32}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_all_other_attention_stays_transformers(package, why, how):
    attended(**{"module": Attention()} | how)
    assert not CALLS, why


@pytest.mark.parametrize("window", [None, 3, 20])
def test_packed_sequences_are_theirs_too(package, window):
    packed = attention.Packed(rows_of([4, 2]), window)
    found, expected = (attended(Attention(by_te=by_te), packed) for by_te in (True, False))
    assert found.shape == expected.shape
    assert error(found, expected) < 0.01
    assert CALLS == {"thd": 2}


def test_with_sinks_packed_sequences_stay_ours(package):
    packed = attention.Packed(rows_of([6]), None)
    attended(Attention(), packed, s_aux=torch.zeros(4, dtype=BF16))
    assert not CALLS


def test_only_under_sdpa_attention_is_theirs_and_the_report_says_so(package):
    model = build_tiny("qwen3_moe", BF16)
    assert engine.install(model, ["attention"]) == [
        "attention by TransformerEngine in 2 of the layers, where it is causal and without dropout"
    ]
    model(torch.arange(8)[None])
    assert CALLS["bshd"] == 3  # one of them asks whether there is a kernel for such heads
    model = build_tiny("qwen3_moe", BF16)
    model.set_attn_implementation("eager")
    why = "no attention by TransformerEngine: attn_implementation is eager, not sdpa"
    assert engine.install(model, ["attention"]) == [why]
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    assert engine.install(model, ["attention"]) == ["no attention by TransformerEngine: no layer is causal"]
    assert engine.install(model, []) == []


@pytest.mark.parametrize("how", ["all scores", "no kernel"])
def test_heads_that_it_has_no_fused_kernel_for_stay_transformers(package, how):
    if how == "all scores":
        package.setitem(fake_te_parts.BACKENDS, "use_unfused_attention", True)
    else:
        package.setattr(te_attention, "attend_rows", raising)
    packed = attention.Packed(rows_of([4, 2]), 3)
    if how == "no kernel":
        package.setattr(te_attention, "attend_packed", raising)
    for mask in (None, packed):
        found, expected = (attended(Attention(by_te=by_te), mask) for by_te in (True, False))
        assert torch.equal(found, expected)
    assert sum(CALLS.values()) == (2 if how == "all scores" else 0)  # the questions
    attended(Attention(), packed)
    assert sum(CALLS.values()) == (2 if how == "all scores" else 0)


def raising(*_):
    raise ValueError("No dot product attention backend is available for the provided inputs.")


def test_the_question_is_not_saved_for_backward(package):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        q = torch.randn(1, 2, 6, 8, dtype=BF16, requires_grad=True)
        assert te_attention.suits(q, q, q, 0.3, "bshd")
        assert te_attention.suits(q, q, q, 0.3, "thd", is_windowed=True)
    assert not kept


# ---- FP8


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [16, 5])
def test_a_layer_in_fp8_is_near_to_exact(package, num_rows, has_bias):
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(2, num_rows, 48), torch.randn(32, 48), torch.randn(2, num_rows, 32)
    leaves = [x, weight, *([torch.randn(32)] if has_bias else [])]
    leaves, gradient = [each.to(BF16) for each in leaves], gradient.to(BF16)
    found = both_ways(lambda x, w, b=None: te_fp8.linear(x, w, b), leaves, gradient)
    exact = both_ways(functional.linear, [each.double() for each in leaves], gradient.double())
    assert CALLS == {"quantised": 4, "fp8 TN": 1, "fp8 NN": 1, "fp8 NT": 1}
    for one, other in zip(found, exact, strict=True):
        assert (one.shape, one.dtype) == (other.shape, BF16)
        assert error(one, other) < 0.1


def test_what_needs_no_gradient_is_not_computed_in_fp8(package):
    torch.manual_seed(0)
    x, weight, gradient = (torch.randn(*shape, dtype=BF16) for shape in ((16, 32), (48, 32), (16, 48)))
    plain = both_ways(lambda x, w: te_fp8.linear(x, w, None), (x, weight), gradient)
    for function, leaves, expected, calls in (
        (lambda x: te_fp8.linear(x, weight, None), (x,), plain[:2], {"fp8 TN": 1, "fp8 NN": 1, "quantised": 4}),
        (
            lambda w: te_fp8.linear(x, w, None),
            (weight,),
            [plain[0], plain[2]],
            {"fp8 TN": 1, "fp8 NT": 1, "quantised": 3},
        ),
    ):
        CALLS.clear()
        found = both_ways(function, leaves, gradient)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert calls == CALLS


def test_a_recompute_gives_the_same_bits_in_fp8(package):
    torch.manual_seed(0)
    x, weight, gradient = (torch.randn(*shape, dtype=BF16) for shape in ((16, 32), (48, 32), (16, 48)))

    def layer(x, weight):
        return te_fp8.linear(x, weight, None)

    plain = both_ways(layer, (x, weight), gradient)
    again = both_ways(lambda x, w: checkpoint(layer, x, w, use_reentrant=False), (x, weight), gradient)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


def in_fp8(model):
    return sorted(name for name, each in model.named_modules() if isinstance(each, engine._InFP8))


def test_layers_that_are_large_compute_in_fp8_in_training_and_the_output_layer_does_not(package):
    package.setattr(te_fp8, "WORTH", 16 * 32)
    model = build_tiny("qwen3_moe", BF16, hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=1)
    state = {name: (each.shape, each.dtype) for name, each in model.state_dict().items()}
    assert engine.compute_in_fp8(model) == "8 of 8 linear layers in FP8: those of 512 weights and more"
    assert engine.compute_in_fp8(model) == "8 of 8 linear layers in FP8: those of 512 weights and more"
    expected = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "koqv"]
    assert in_fp8(model) == expected
    index = torch.arange(16)[None]
    model(index, labels=index).loss.backward()
    assert {name: count for name, count in CALLS.items() if name != "quantised"} == {
        "fp8 TN": 8,
        "fp8 NN": 8,
        "fp8 NT": 8,
    }
    assert {name: (each.shape, each.dtype) for name, each in model.state_dict().items()} == state
    assert in_fp8(copy.deepcopy(model)) == expected
    CALLS.clear()
    model.eval()(index)
    assert not CALLS


def test_small_layers_hooked_layers_and_odd_sizes_stay(package):
    package.setattr(te_fp8, "WORTH", 1024)
    model = nn.Sequential(nn.Linear(32, 31), nn.Linear(31, 64), nn.Linear(64, 16, bias=False), nn.Linear(16, 48))
    model[2].register_forward_hook(lambda *_: None)
    assert engine.compute_in_fp8(model) == "0 of 4 linear layers in FP8: those of 1,024 weights and more"
    model[2]._forward_hooks.clear()
    assert engine.compute_in_fp8(model) == "1 of 4 linear layers in FP8: those of 1,024 weights and more"


def test_fp32_and_autocast_in_fp8(package):
    package.setattr(te_fp8, "WORTH", 0)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 48))
    plain = copy.deepcopy(layer)
    engine.compute_in_fp8(layer)
    x = torch.randn(16, 32)
    assert torch.equal(layer(x), plain(x))
    assert not CALLS
    with torch.autocast("cpu", BF16):
        found, expected = layer(x), plain(x)
    assert found.dtype == expected.dtype == BF16
    assert error(found, expected) < 0.1
    found.sum().backward()
    assert layer[0].weight.grad.dtype == torch.float32
    assert CALLS["fp8 NT"] == 1


def adapted(**how):
    model = build_tiny("qwen3_moe", BF16, hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=2)
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], **how)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()


def test_with_lora_base_layers_are_in_fp8_adapters_are_not_and_the_report_says_who_computes(package):
    package.setattr(te_fp8, "WORTH", 0)
    model = adapted()
    engine.compute_in_fp8(model)
    names = {name.rsplit(".", 1)[-1] for name in in_fp8(model)}
    assert names == {"base_layer", "k_proj", "o_proj"}
    assert lora.install(model) == (0, {"a base layer in FP8": 4})
    index = torch.arange(16)[None]
    model(input_ids=index, labels=index).loss.backward()
    assert CALLS["fp8 TN"] == 8


@pytest.mark.parametrize("how", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_the_output_layer_is_not_in_fp8_whatever_peft_wraps_it_in(package, how):
    package.setattr(te_fp8, "WORTH", 0)
    model = build_tiny("qwen3_moe", BF16)
    how = {"target_modules": ["q_proj"]} | how
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, **how), autocast_adapter_dtype=False)
    engine.compute_in_fp8(model)
    assert in_fp8(model)
    assert not any("lm_head" in name for name in in_fp8(model))


def test_nothing_holds_the_inputs_after_backward(package):
    x, weight = torch.randn(16, 32, dtype=BF16), torch.randn(48, 32, dtype=BF16, requires_grad=True)
    y = te_fp8.linear(x, weight, None)
    node = y.grad_fn.next_functions[0][0]
    y.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    assert all(each is None for each in node.x8s[0].values.values())
    y.sum().backward()
    assert torch.equal(weight.grad, 2 * first)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_trial_that_gives_nan_anywhere_is_refused(wrong):
    right = [torch.ones(3) for _ in range(3)]
    found = [torch.full((3,), torch.nan) if at == wrong else each for at, each in enumerate(right)]
    assert te.off("general_gemm", lambda: right, right) is None
    assert te.off("general_gemm", lambda: found, right).endswith(" is off by nan%")


# ---- asking for them


MODELS = {"bf16": BF16, "fp32": torch.float32}
FP32 = "nothing by TransformerEngine, which computes 16-bit floats: the model is in fp32"
COMPILED = "norms, fp8 not by TransformerEngine: torch.compile is to compile the model"
NORMS = "norms as fused: autocast leaves their weights in fp32"


@pytest.mark.parametrize(
    ("dtype", "computed", "taken", "said"),
    [
        ("bf16", engine.Computed(), ["norms", "fp8"], []),
        ("fp32", engine.Computed(), [], [FP32]),
        ("fp32", engine.Computed("bf16"), ["fp8"], [NORMS]),
        ("fp32", engine.Computed("bf16", by_fsdp2=True), ["norms", "fp8"], []),
        ("bf16", engine.Computed("bf16"), ["norms", "fp8"], []),
        ("bf16", engine.Computed(compiled=True), [], [COMPILED]),
    ],
)
def test_what_a_model_cannot_have_is_not_claimed(dtype, computed, taken, said):
    model = build_tiny("qwen3_moe", MODELS[dtype])
    assert engine.choose(model, ["norms", "fp8"], computed) == (taken, said)
    with_experts = [] if said == [FP32] else ["experts", *taken]
    assert engine.choose(model, ["experts", "norms", "fp8"], computed) == (with_experts, said)


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
    if dtype == "fp32":
        assert report.notes == (FP32,)
        assert not CALLS
    else:
        attends = "attention by TransformerEngine in 2 of the layers, where it is causal and without dropout"
        assert report.notes == (attends, "8 of 8 linear layers in FP8: those of 0 weights and more")
        assert set(CALLS) >= {"TN", "NN", "NT", "bshd", "fp8 TN", "fp8 NN", "fp8 NT"}


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
    all_of_them = "grouped GEMMs of the experts, RMSNorm, attention and large linear layers in FP8"
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
