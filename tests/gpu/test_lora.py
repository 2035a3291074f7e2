"""LoRA on experts on a GPU, in bf16: no worse than PEFT's own against fp64.

run: pytest -m gpu tests/gpu
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_accel import experts
from tests.families import build_tiny, randomise
from tests.gpu.test_experts import BF16_SLACK, NUM_TOKENS, SIZES, TOP_K

pytestmark = pytest.mark.gpu


def computed(wrapper, x, choices, weights, dtype, join=False):
    """Output, and gradients of x, the routing weights and the adapters, in a dtype."""
    wrapper = copy.deepcopy(wrapper).to(dtype)
    if join:
        experts.join_adapters(wrapper)
        assert len(experts.settings_of(wrapper.get_base_layer()).joined) == 2
    x, weights = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
    output = wrapper(x, choices, weights)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    gradients = {name: each.grad for name, each in wrapper.named_parameters() if each.grad is not None}
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, **gradients}


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_bf16_is_as_near_to_fp64_as_pefts_own(family, join):
    experts.register()
    model = build_tiny(family, torch.bfloat16, **SIZES)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=12, target_modules=[], target_parameters=targets))
    randomise(model, seed=7, only="lora_")
    ours = next(each for each in model.modules() if type(each).__name__ == "ParamWrapper").cuda()
    peft = copy.deepcopy(ours)
    peft.get_base_layer().config = copy.deepcopy(peft.get_base_layer().config)
    peft.get_base_layer().config._experts_implementation = "grouped_mm"
    true = copy.deepcopy(peft)
    true.get_base_layer().config = copy.deepcopy(true.get_base_layer().config)
    true.get_base_layer().config._experts_implementation = "eager"
    module = ours.get_base_layer()
    experts.install(module, experts.Settings("fused"))
    experts.install_adapters(ours, [("experts", module)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, 512, generator=generator).bfloat16().cuda()
    choices = torch.randn(NUM_TOKENS, module.num_experts, generator=generator).topk(TOP_K).indices.cuda()
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator).bfloat16().cuda()
    inputs = x, choices, weights
    truth = computed(true, *inputs, torch.float64)
    found, native = computed(ours, *inputs, torch.bfloat16, join), computed(peft, *inputs, torch.bfloat16)
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        errors = [((each[name].double() - expected).norm() / expected.norm()).item() for each in (found, native)]
        assert errors[0] <= BF16_SLACK * errors[1] + 1e-4, (name, errors)
