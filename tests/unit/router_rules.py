"""Rules of routers as models have them, for the tests of the kernels."""

import torch

from moe_accel.kernels.router import Rule

DEEPSEEK = {"sigmoid": True, "renormalise": True, "scale": 2.5, "epsilon": 1e-20}
RULES = {  # name: rule, number of experts, whether their scores are corrected
    "qwen3": (Rule(8, renormalise=True), 128, False),
    "olmoe": (Rule(8), 64, False),
    "mixtral": (Rule(2, renormalise=True), 8, False),
    "gpt-oss, scaled": (Rule(4, renormalise=True, scale=0.25), 32, False),
    "qwen2, 60 experts": (Rule(4), 60, False),
    "deepseek-v3": (Rule(8, num_groups=8, top_groups=4, **DEEPSEEK), 256, True),
    "one of two groups": (Rule(2, num_groups=2, top_groups=1, **DEEPSEEK), 8, True),
    "groups alone": (Rule(3, num_groups=4, top_groups=2, **DEEPSEEK), 16, False),
    "kimi-k2": (Rule(8, **DEEPSEEK), 384, True),
    "nemotron": (Rule(22, **DEEPSEEK), 512, True),
    "sigmoid, not renormalised": (Rule(6, sigmoid=True, scale=1.5), 24, True),
    "sigmoid alone": (Rule(3, sigmoid=True, renormalise=True), 5, False),
    "all of three": (Rule(3), 3, False),
    "one of one": (Rule(1, renormalise=True), 1, False),
    "most": (Rule(32), 512, False),
}


# families whose tiny models have these rules
SOFTMAX = [
    "cohere2_moe",
    "deepseek_ocr2",
    "deepseek_v2",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "mellum",
    "minimax",
    "mixtral",
    "olmoe",
    "openai_privacy_filter",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_omni_moe_talker",
    "qwen3_vl_moe",
    "qwen4_exp",
]
GROUPS = [
    "axk1",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "mimo_v2_flash",
    "nemotron_h",
    "solar_open",
]
SIGMOID = [
    "afmoe",
    "hy_v3",
    "laguna",
    "minimax_m2",
    "minimax_m3_vl",
]
FUSED = {
    **dict.fromkeys(SOFTMAX, "top 2 by softmax"),
    **dict.fromkeys(GROUPS, "top 2 by sigmoid, 1 of 2 groups"),
    **dict.fromkeys(SIGMOID, "top 2 by sigmoid"),
}
"""Rule by family, as text; the routers of all others stay."""


def given(name, num_tokens=19, dtype=torch.float32, device="cpu"):
    """Logits [N,E], corrections [E] or None, and a gradient of the weights [N,K], of a rule."""
    rule, num_experts, biased = RULES[name]
    generator = torch.Generator().manual_seed(num_experts + rule.top_k)
    logits = 2 * torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)
    bias = torch.randn(num_experts, dtype=torch.float64, generator=generator) / 4 if biased else None
    gradient = torch.randn(num_tokens, rule.top_k, dtype=torch.float64, generator=generator)
    of_bias = None if bias is None else bias.to(device, torch.promote_types(dtype, torch.float32))
    return logits.to(device, dtype), of_bias, gradient.to(device, dtype)
