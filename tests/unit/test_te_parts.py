"""`te_parts`: norms, attention and FP8 layers by TransformerEngine's calling contract, or the exact reason why not."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import AttentionInterface

from moe_accel import block, engine, lora
from moe_accel.kernels import te, te_attention, te_fp8, te_norm
from moe_accel.kernels.rms_norm import rms_norm
from moe_accel.padding import attention
from moe_accel.padding.rows import Rows
from tests import fake_te_parts
from tests.fake_transformer_engine import CALLS
from tests.families import build_tiny
from tests.gradients import both_ways, relative_error

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


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
        assert relative_error(one, other) < 0.01


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
    assert relative_error(attended(Attention()), attended(Attention(by_te=False))) < 0.01
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
    assert relative_error(found, expected) < 0.01
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
    assert CALLS["bshd"] + CALLS["thd"] == (2 if how == "all scores" else 0)  # the questions
    attended(Attention(), packed)
    assert CALLS["bshd"] + CALLS["thd"] == (2 if how == "all scores" else 0)


def raising(*_):
    raise ValueError("No dot product attention backend is available for the provided inputs.")


def test_the_question_is_not_saved_for_backward_and_takes_no_random_numbers(package, capsys):
    kept = []
    q = torch.randn(1, 2, 6, 8, dtype=BF16, requires_grad=True)
    before = torch.random.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        assert te_attention.suits(q, q, q, 0.3, "bshd")
        assert te_attention.suits(q, q, q, 0.3, "thd", is_windowed=True)
    assert not kept
    assert torch.equal(torch.random.get_rng_state(), before)
    te_attention.attend_rows(q, q, q, 0.3)
    assert not torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr().err == ""


def test_a_refusal_is_said_once_and_no_memory_is_none(package, capsys):
    q = torch.randn(1, 2, 6, 8, dtype=BF16)
    package.setattr(te_attention, "attend_rows", raising)
    assert not te_attention.suits(q, q, q, 0.3, "bshd")
    assert not te_attention.suits(q, q, q, 0.3, "bshd")
    why = "ValueError: No dot product attention backend is available for the provided inputs."
    assert capsys.readouterr().err == f"moe-accel: TransformerEngine has no fused attention for 2 heads of 8: {why}\n"

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    package.setattr(te_attention, "attend_packed", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        te_attention.suits(q, q, q, 0.3, "thd")


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
        assert relative_error(one, other) < 0.1


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
    assert relative_error(found, expected) < 0.1
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
    assert lora.install(model) == (0, {"a base layer with a way of its own, as in FP8": 4})
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
