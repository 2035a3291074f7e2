"""The parts of `te_parts` on a GPU: each is right by itself, and a model trains with all of them.

run: PYTHONPATH=FOLDER_WITH_TE python3 -m pytest -q -m gpu tests/gpu/test_te_parts.py -c /dev/null --rootdir .
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe_accel import MoEConfig, engine
from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import te_attention, te_fp8, te_norm, te_parts, te_router, te_rows
from moe_accel.kernels.grouped import TORCH
from moe_accel.kernels.rms_norm import rms_norm
from moe_accel.kernels.router import Rule, route
from moe_accel.plugin import reports
from tests.families import build_tiny
from tests.gradients import both_ways, by_expert, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = next(filter(None, (te_parts.problem(DEVICE, name) for name in te_parts.PARTS)), None)
BF16 = torch.bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"kernels=te cannot be used: {WHY_NOT}")]


def randn(*shape, dtype=BF16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("name", te_parts.PARTS)
def test_each_part_is_tried_and_right(name):
    assert te_parts.PARTS[name].tried(DEVICE) is None


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 7, 128), (3, 5, 4, 64), (9, 2880), (33, 7168), (1, 100)])
def test_a_norm_is_as_near_to_fp64_as_ours(shape, offset):
    torch.manual_seed(0)
    x, weight, gradient = randn(*shape), randn(shape[-1]), randn(*shape)

    def exact(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight + offset)

    truth = both_ways(exact, (x.double(), weight.double()), gradient)
    ours = both_ways(lambda x, w: rms_norm(x, w, 1e-6, offset), (x, weight), gradient)
    found = both_ways(lambda x, w: te_norm.rms_norm(x, w, 1e-6, offset), (x, weight), gradient)
    for one, own, true in zip(found, ours, truth, strict=True):
        assert (one.shape, one.dtype) == (own.shape, own.dtype)
        assert relative_error(one, true) <= 1.1 * relative_error(own, true) + 1e-5


def test_a_norm_of_rows_that_lie_apart_is_that_of_a_copy():
    torch.manual_seed(0)
    wide, weight, gradient = randn(6, 256), randn(128), randn(6, 128)
    found = both_ways(lambda x, w: te_norm.rms_norm(x[:, :128], w, 1e-6), (wide, weight), gradient)
    expected = both_ways(lambda x, w: te_norm.rms_norm(x[:, :128].contiguous(), w, 1e-6), (wide, weight), gradient)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("num_key_heads", [2, 4])
def test_attention_of_rows_is_near_to_fp64(width, value_width, num_key_heads):
    if width != value_width and num_key_heads != 4:
        pytest.skip("no model has keys wider than values, and fewer heads of them")
    torch.manual_seed(0)
    q, k, v = randn(2, 4, 96, width), randn(2, num_key_heads, 96, width), randn(2, num_key_heads, 96, value_width)
    gradient = randn(2, 96, 4, value_width)

    def exact(q, k, v):
        k, v = (each.repeat_interleave(4 // num_key_heads, 1) for each in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1).transpose(1, 2)

    truth = both_ways(exact, [each.double() for each in (q, k, v)], gradient)
    found = both_ways(lambda *qkv: te_attention.attend_rows(*qkv, 0.1), (q, k, v), gradient)
    for one, true in zip(found, truth, strict=True):
        assert one.shape == true.shape
        assert relative_error(one, true) < 0.01


@pytest.mark.parametrize("window", [None, 8])
def test_attention_of_packed_sequences_is_near_to_fp64(window):
    torch.manual_seed(0)
    lengths, num_tokens = (5, 30, 1, 28), 64
    q, k, v = randn(num_tokens, 4, 64), randn(num_tokens, 2, 64), randn(num_tokens, 2, 64)
    gradient = randn(num_tokens, 4, 64)
    bounds = torch.tensor([0, 5, 35, 36, 64], dtype=torch.int32, device=DEVICE)
    at = torch.arange(num_tokens, device=DEVICE)
    sequence = torch.repeat_interleave(torch.arange(4, device=DEVICE), torch.tensor(lengths, device=DEVICE))
    seen = (sequence[:, None] == sequence) & (at[:, None] >= at) & (at[:, None] - at < (window or num_tokens))

    def exact(q, k, v):
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.1)[0].transpose(0, 1)

    def packed(q, k, v):
        return te_attention.attend_packed(q, k, v, bounds, max(lengths), window, 0.1)

    truth = both_ways(exact, [each.double() for each in (q, k, v)], gradient)
    for one, true in zip(both_ways(packed, (q, k, v), gradient), truth, strict=True):
        assert one.shape == true.shape
        assert relative_error(one, true) < 0.01


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [32, 21])
def test_a_layer_in_fp8_has_the_bits_of_its_own_module(has_bias, num_rows):
    import transformer_engine.pytorch as tep
    from transformer_engine.common.recipe import Float8CurrentScaling

    torch.manual_seed(0)
    x, weight, gradient = randn(2, num_rows, 128), randn(64, 128), randn(2, num_rows, 64)
    leaves = [x, weight, *([randn(64)] if has_bias else [])]
    found = both_ways(lambda x, w, b=None: te_fp8.linear(x, w, b), leaves, gradient)
    left = -2 * num_rows % te_fp8.MULTIPLE
    module = tep.Linear(128, 64, bias=has_bias, params_dtype=BF16, device=DEVICE)

    def theirs(x, weight, bias=None):
        given = {"weight": weight} | ({} if bias is None else {"bias": bias})
        with tep.autocast(enabled=True, recipe=Float8CurrentScaling()):
            rows = functional.pad(x.flatten(0, 1), (0, 0, 0, left))
            return torch.func.functional_call(module, given, (rows,))[: 2 * num_rows].view(2, num_rows, 64)

    for one, other in zip(found, both_ways(theirs, leaves, gradient), strict=True):
        assert torch.equal(one, other)
    exact = both_ways(lambda x, w, b=None: functional.linear(x, w, b), [each.double() for each in leaves], gradient)
    assert all(relative_error(one, true) < 0.1 for one, true in zip(found, exact, strict=True))


def test_recompute_and_frozen_weights_change_no_bit_in_fp8():
    torch.manual_seed(0)
    x, weight, gradient = randn(48, 128), randn(64, 128), randn(48, 64)
    plain = both_ways(lambda x, w: te_fp8.linear(x, w, None), (x, weight), gradient)
    again = both_ways(
        lambda x, w: checkpoint(lambda x, w: te_fp8.linear(x, w, None), x, w, use_reentrant=False),
        (x, weight),
        gradient,
    )
    frozen = both_ways(lambda x: te_fp8.linear(x, weight, None), (x,), gradient)
    only = both_ways(lambda w: te_fp8.linear(x, w, None), (weight,), gradient)
    for found, expected in ((again, plain), (frozen, plain[:2]), (only, [plain[0], plain[2]])):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


RULES = {
    "softmax": Rule(8, renormalise=True),
    "of all": Rule(8, scale=0.5),
    "sigmoid": Rule(8, sigmoid=True, renormalise=True, scale=2.5, epsilon=1e-20),
    "groups": Rule(8, sigmoid=True, renormalise=True, scale=2.5, epsilon=1e-20, num_groups=8, top_groups=4),
}


@pytest.mark.parametrize("num_experts", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_router_gives_each_expert_what_ours_gives(rule, dtype, num_experts):
    assert te_router.takes(rule)
    torch.manual_seed(0)
    logits, bias = randn(500, num_experts, dtype=dtype), torch.rand(num_experts, device=DEVICE)
    given = logits, bias, rule, randn(500, num_experts, dtype=torch.float32)
    one, one_gradient = by_expert(route, *given)
    other, other_gradient = by_expert(te_router.route, *given)
    same = ((one != 0) == (other != 0)).all(1)  # of near-equal scores either may be chosen
    assert same.float().mean() > (0.9 if dtype == BF16 else 0.99)
    assert relative_error(other[same], one[same]) < 1e-5
    assert relative_error(other_gradient[same], one_gradient[same]) < (1e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("hidden", [2048, 2880, 7168])
@pytest.mark.parametrize("elsewhere", [0.0, 0.5])
def test_rows_are_copied_and_summed_as_by_ours(hidden, elsewhere):
    torch.manual_seed(0)
    choices = torch.rand(1000, 64, device=DEVICE).topk(8).indices
    choices = choices.masked_fill(torch.rand(choices.shape, device=DEVICE) < elsewhere, -1)
    choices[-1] = -1
    routing = sort_by_expert(choices, 64, int((choices >= 0).sum()))
    moving, of_rows = te_rows.moving(TORCH), te_rows.with_places(routing.rows, 8)
    x = randn(1000, hidden)
    copies = moving.gather(x, of_rows)
    assert torch.equal(copies, TORCH.gather(x, routing.rows))
    assert relative_error(moving.sum_copies(copies, of_rows), TORCH.sum_copies(copies, of_rows)) < 1e-4


def prepared(parts, precision="no"):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = MoEConfig(kernels="te", te_parts=parts) if parts else MoEConfig()
    accelerator = Accelerator(parallelism_config=config, mixed_precision=precision)
    torch.manual_seed(0)
    model = build_tiny("qwen3_moe", BF16 if precision == "no" else torch.float32, attn_implementation="sdpa")
    names = {name: (each.shape, each.dtype) for name, each in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, names


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("parts", [[name] for name in te_parts.PARTS] + [list(te_parts.PARTS)], ids=" ".join)
def test_a_model_learns_as_without(parts, precision, monkeypatch):
    monkeypatch.setattr(te_fp8, "WORTH", 0)
    curves = []
    for of_te in ([], parts):
        accelerator, model, optimizer, names = prepared(of_te, precision)
        losses = []
        for step in range(12):
            index = (torch.arange(128, device=DEVICE).view(4, 32) * (step + 3)) % 64
            loss = model(input_ids=index, labels=index).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
        of_state = accelerator.unwrap_model(model).state_dict()
        assert {name: (each.shape, each.dtype) for name, each in of_state.items()} == names
    plain, found = curves
    assert found[-1] < found[0]
    assert found == pytest.approx(plain, rel=0.05 if "fp8" in parts else 0.01)
    (report,) = reports(accelerator)
    fp32_norms = precision == "bf16" and parts == ["norms"]  # autocast leaves their weights in fp32
    assert report.kernels.value == ("fused" if fp32_norms else "te")
    assert ("fp8" in parts) == any("linear layers in FP8" in note for note in report.notes)


def test_padded_and_packed_batches_attend_as_without():
    losses = []
    index = torch.arange(128, device=DEVICE).view(4, 32) % 64
    mask = torch.ones_like(index)
    for row, length in enumerate((32, 20, 9, 15)):
        mask[row, length:] = 0
    for parts in ([], ["attention"]):
        _, model, _, _ = prepared(parts)
        ragged = model(input_ids=index, attention_mask=mask, labels=index.masked_fill(mask == 0, -100)).loss
        places = torch.cat([torch.arange(50), torch.arange(78)])[None].to(DEVICE)
        packed = model(input_ids=index.view(1, 128), position_ids=places, labels=index.view(1, 128)).loss
        losses.append([ragged.item(), packed.item()])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_evaluation_is_not_in_fp8(monkeypatch):
    monkeypatch.setattr(te_fp8, "WORTH", 0)
    torch.manual_seed(0)
    model = build_tiny("qwen3_moe", BF16).to(DEVICE)
    other = copy.deepcopy(model)
    said = engine.compute_in_fp8(other)
    index = torch.arange(64, device=DEVICE).view(4, 16) % 64
    assert said.endswith("linear layers in FP8: those of 0 weights and more")
    assert torch.equal(other.eval()(index).logits, model.eval()(index).logits)
    assert not torch.equal(other.train()(index).logits, model.train()(index).logits)
