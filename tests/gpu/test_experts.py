"""The experts function on a GPU, in bf16: right, deterministic, and never waiting for the device.

run: pytest -m gpu tests/gpu
"""

import copy

import pytest
import torch

from moe_accel import experts
from tests.families import build_tiny, experts_modules
from tests.gradients import relative_error

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 512, "moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "gemma4"]
NUM_TOKENS, TOP_K = 2048, 4

BF16_SLACK = 1.3
"""How much larger than native's our error against fp64 may be: both round to bf16 at about as many places."""


@pytest.fixture(autouse=True, scope="module")
def _registered():
    experts.register()


def module_and_inputs(family, weights_dtype=torch.bfloat16):
    model = build_tiny(family, torch.bfloat16, **({} if family == "nemotron_h" else SIZES))
    module = next(module for _, module in experts_modules(model)).cuda()
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    skew = torch.rand(module.num_experts, generator=generator) * 2
    choices = (torch.randn(NUM_TOKENS, module.num_experts, generator=generator) + skew).topk(TOP_K).indices
    x = torch.randn(NUM_TOKENS, width, generator=generator).bfloat16()
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator).to(weights_dtype)
    return module, [each.cuda() for each in (x, choices, weights)]


def computed(module, forward, x, choices, weights):
    module = copy.deepcopy(module)
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    output = forward(module, x, choices, weights)
    generator = torch.Generator(device="cuda").manual_seed(1)
    noise = torch.randn(output.shape, device="cuda", generator=generator)
    output.backward(noise.bfloat16().to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, **gradients}


def by(implementation):
    def forward(module, *inputs):
        if implementation == "moe_accel":
            experts.install(module, experts.Settings("fused"))
        module.config._experts_implementation = implementation
        return module(*inputs)

    return forward


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_about_as_close_to_fp64_as_native(family, weights_dtype):
    module, (x, choices, weights) = module_and_inputs(family, weights_dtype)
    eager = type(module).forward.__wrapped__
    truth = computed(module.double(), eager, x.double(), choices, weights.double())
    module = module.bfloat16()
    native = computed(module, by("grouped_mm"), x, choices, weights)
    ours = computed(module, by("moe_accel"), x, choices, weights)
    for name, values in ours.items():
        error, allowed = relative_error(values, truth[name]), relative_error(native[name], truth[name])
        assert values.dtype == native[name].dtype
        assert error <= BF16_SLACK * allowed + 1e-6, f"{name}: {error:.2e}, native {allowed:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_call_twice_gives_the_same_bits(family):
    module, inputs = module_and_inputs(family)
    first, second = (computed(module, by("moe_accel"), *inputs) for _ in range(2))
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_never_waits_for_the_device(family):
    module, (x, choices, weights) = module_and_inputs(family)
    experts.install(module, experts.Settings("fused"))
    x, weights = x.requires_grad_(), weights.requires_grad_()
    for _ in range(2):  # once to warm up: cuBLAS and the allocator may wait the first time
        module(x, choices, weights).float().square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, choices, weights).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
