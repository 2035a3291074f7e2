"""What `moe-accel bench` divides by and compares with: shapes, operations, routing, and when two arms agree."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moe_accel.bench import check, flops, routing, suites
from moe_accel.bench.options import ROUTINGS
from moe_accel.bench.shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "parameters", "flops_a_token"),
    [
        ("qwen3-30b-a3b", 30.53e9, 23.08e9),
        ("mixtral-8x7b", 46.70e9, 79.7e9),
        ("gpt-oss-20b", 20.91e9, 22.9e9),
        ("nemotron-3-nano", 31.58e9, 20.2e9),
    ],
)
def test_a_shape_has_the_parameters_of_the_released_model(name, parameters, flops_a_token):
    """Parameters: of the model cards. Operations: counted by hand from the released configs, 4096 tokens a sequence."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(shape.released_layers), dtype=torch.bfloat16)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert flops.step_flops(model, 1, 4096) == pytest.approx(flops_a_token, rel=2e-3)


def counted(model, tokens):
    """Operations that torch counts, but for a product of 5.17, and not of 5.24: the angles of the rotary embedding."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    by_module = counter.get_flop_counts().items()
    angles = sum(sum(found.values()) for name, found in by_module if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def tiny_model(**more):
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(SHAPES["tiny"].config(2, **how, **more)).train()
    suites.randomise(model)
    return model


def test_operations_of_a_full_step_are_those_that_torch_counts():
    model, tokens = tiny_model(), torch.arange(32).view(2, 16)
    assert flops.step_flops(model, 32, 16, causal=False) == counted(model, tokens)


def test_causal_attention_counts_half_and_a_window_counts_its_keys():
    model = tiny_model()
    weights = flops.step_flops(model, 1, 0.0001)
    full = flops.step_flops(model, 1, 64, causal=False) - weights
    assert flops.step_flops(model, 1, 64) - weights == pytest.approx(full / 2, rel=1e-3)
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 16
    assert flops.step_flops(model, 1, 64) - weights == pytest.approx(full * (16 - 16**2 / 128) / 64, rel=1e-3)


def test_operations_of_lora_are_those_that_torch_counts():
    """Adapters on attention only: PEFT's own experts compute whole weight gradients, which are no work of the model."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    model.enable_input_require_grads()  # or the first layer needs no gradient of its input
    suites.randomise(model)
    tokens = torch.arange(32).view(2, 16)
    assert flops.step_flops(model, 32, 16, causal=False) == counted(model, tokens)


def test_adapters_on_experts_count_for_the_experts_that_a_token_meets():
    model = tiny_model()
    frozen = flops.active_parameters(model)
    adapted = suites.adapt(model, 4)
    attention = 4 * (64 + 64) * 2 + 4 * (64 + 32) * 2  # q and o, k and v
    experts = 2 * (4 * (64 + 64) + 4 * (32 + 64))  # top-2 of both projections
    assert flops.active_parameters(adapted) - frozen == 2 * (attention + experts)


# routing


@pytest.mark.parametrize("kind", ROUTINGS[1:])
def test_a_fixed_choice_has_different_experts_for_each_token_and_the_load_it_promises(kind):
    num_tokens, num_experts, top_k = 4096, 128, 8
    index = routing.choices(kind, num_tokens, num_experts, top_k)
    assert torch.equal(index, routing.choices(kind, num_tokens, num_experts, top_k))
    assert (index.sort(1).values.diff(dim=1) > 0).all()
    load = index.flatten().bincount(minlength=num_experts)
    if kind == "balanced":
        assert load.unique().tolist() == [num_tokens * top_k // num_experts]
    if kind == "hot":
        assert load[routing.HOT] == num_tokens
    if kind == "zipf":
        assert load[0] == load.max()
        assert 0.08 < load[0] / load.sum() < 0.12


def test_the_choice_reaches_the_experts_inside_of_peft():
    adapted = suites.adapt(tiny_model(), 4)
    routing.install(adapted, "hot", 32, 2, 8)
    seen = []
    for module in adapted.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    adapted(input_ids=torch.arange(32).view(2, 16))
    assert len(seen) == 2
    assert all((index == routing.HOT).any(1).all() for index in seen)


# the comparison


def prints(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{at}.up.weight": torch.randn(64, 96, generator=generator) for at in range(3)}
    tensors |= {name: tensor * changes.get("scale", 1) for name, tensor in tensors.items()}
    if "noise" in changes:
        noise = {name: torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
        tensors = {name: tensor + changes["noise"] * noise[name] for name, tensor in tensors.items()}
    return check.fingerprint(changes.get("loss", 2.0), tensors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": 1.02}, "gradient of layers.*.up.weight: norm off by 2.0e-02, 1.0e-02 allowed"),
        ({"scale": -1}, "gradient of layers.*.up.weight: elements off by 2.0e+00, 2.0e-02 allowed"),
        ({"noise": 0.05}, "gradient of layers.*.up.weight: elements off by 5.0e-02, 2.0e-02 allowed"),
        ({"loss": 2.01}, "loss 2.01 differs from 2 by 5.0e-03, 2.0e-03 allowed"),
        ({"loss": float("nan")}, "loss nan differs from 2 by nan, 2.0e-03 allowed"),
        ({"scale": float("nan")}, "gradient of layers.*.up.weight: norm off by nan, 1.0e-02 allowed"),
    ],
)
def test_a_difference_above_its_limit_is_said(changes, said):
    verdict = check.compare(prints(**changes), prints(), [prints(noise=0.001)], torch.bfloat16)
    assert said in verdict.problems


def test_a_limit_is_four_times_the_most_noise_of_the_reference_itself():
    noisy = [prints(noise=0.001), prints(noise=0.02)]
    assert check.compare(prints(noise=0.07), prints(), noisy, torch.bfloat16).problems == ()
    assert check.compare(prints(noise=0.09), prints(), noisy, torch.bfloat16).problems != ()


def test_elements_that_are_noise_are_named_and_their_norm_is_compared_still():
    noisy = [prints(noise=0.3)]
    verdict = check.compare(prints(noise=0.3), prints(), noisy, torch.bfloat16)
    assert (verdict.problems, verdict.says_nothing) == ((), ("layers.*.up.weight",))
    assert check.compare(prints(scale=2), prints(), noisy, torch.bfloat16).problems != ()


def test_kept_elements_come_from_every_column_of_every_expert():
    gradient = torch.arange(64 * 96 * 128).view(64, 96, 128).float()
    _, sample = check.fingerprint(None, {"x": gradient}).tensors["x"]
    assert 40_000 < len(sample) <= check.KEPT + 1
    assert len((sample % 128).unique()) == 128
    assert len((sample // (96 * 128)).unique()) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_noise_moves_a_quarter_of_all_elements_and_none_by_more_than_the_epsilon(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = check.move(x, 1)
    assert 0.2 < (moved != x).double().mean() < 0.35
    assert ((moved.float() - x.float()).abs() <= x.float().abs() * torch.finfo(x.dtype).eps).all()
