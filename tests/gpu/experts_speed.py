"""One layer's experts alone, forward and backward: moe-accel beside transformers' grouped_mm, by shape and routing.

usage      python tests/gpu/experts_speed.py [--tokens 16384]
prints     ms of both (median of 20), their ratio, TFLOP/s of ours, memory that lives between forward and backward; JSON
           lines also in $OUT/experts_speed.jsonl

Outputs and gradients of both are compared before a time is printed. Routing: `random` (uniform scores), `zipf` (the
most wanted expert gets about a tenth of the pairs), `hot` (one expert is among every token's choices).
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.testing import do_bench

from moe_accel import experts

SHAPES = {
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeExperts", {"E": 128, "K": 8, "H": 2048, "I": 768, "act": "silu"}),
    "mixtral-8x7b": ("mixtral", "MixtralExperts", {"E": 8, "K": 2, "H": 4096, "I": 14336, "act": "silu"}),
    "gpt-oss-20b": ("gpt_oss", "GptOssExperts", {"E": 32, "K": 4, "H": 2880, "I": 2880, "act": "silu"}),
    "nemotron-3-nano": ("nemotron_h", "NemotronHExperts", {"E": 128, "K": 6, "H": 2688, "I": 1856, "act": "relu2"}),
    "deepseek-v3 / 4": ("deepseek_v3", "DeepseekV3Experts", {"E": 64, "K": 8, "H": 7168, "I": 2048, "act": "silu"}),
}
CASES = [(shape, "random") for shape in SHAPES] + [("qwen3-30b-a3b", "zipf"), ("qwen3-30b-a3b", "hot")]


def build(family: str, name: str, sizes: dict[str, Any], device: str = "cuda") -> Any:
    config = SimpleNamespace(
        num_experts=sizes["E"],
        num_local_experts=sizes["E"],
        n_routed_experts=sizes["E"],
        hidden_size=sizes["H"],
        intermediate_size=sizes["I"],
        moe_intermediate_size=sizes["I"],
        moe_latent_size=None,
        hidden_act=sizes["act"],
        mlp_hidden_act=sizes["act"],
        mlp_bias=False,
        swiglu_limit=7.0,
        _experts_implementation="grouped_mm",
    )
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    with torch.device(device):
        module = kind(config).bfloat16()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    return module


def choices(kind: str, num_tokens: int, sizes: dict[str, Any]) -> torch.Tensor:
    scores = -torch.empty(num_tokens, sizes["E"], device="cuda").exponential_().log()  # Gumbel noise
    if kind == "zipf":
        scores -= torch.arange(1, sizes["E"] + 1, device="cuda").log()
    if kind == "hot":
        scores[:, 3] = torch.inf
    return scores.topk(sizes["K"]).indices


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    experts.register()
    for shape, routing in CASES:
        family, name, sizes = SHAPES[shape]
        torch.manual_seed(0)
        module = build(family, name, sizes)
        x = torch.randn(args.tokens, sizes["H"], device="cuda").bfloat16().requires_grad_()
        gradient = torch.randn_like(x)
        index = choices(routing, args.tokens, sizes)
        weights = torch.rand(args.tokens, sizes["K"], device="cuda").softmax(-1).requires_grad_()
        inputs = [x, weights, *module.parameters()]

        def step(module=module, x=x, index=index, weights=weights, gradient=gradient, inputs=inputs):
            output = module(x, index, weights.to(x.dtype))
            return [output, *torch.autograd.grad(output, inputs, gradient)]

        found, times, kept = {}, {}, {}
        for arm in ("grouped_mm", "moe_accel"):
            module.config._experts_implementation = arm
            before = torch.cuda.memory_allocated()
            output = module(x, index, weights.to(x.dtype))
            kept[arm] = (torch.cuda.memory_allocated() - before) / 2**30
            del output
            found[arm] = [each.norm().item() for each in step()]
            times[arm] = do_bench(step, warmup=100, rep=400, return_mode="median")
        worst = max(abs(a - b) / b for a, b in zip(found["moe_accel"], found["grouped_mm"], strict=True))
        mats = 2 if family == "nemotron_h" else 3
        flops = 3 * 2 * args.tokens * sizes["K"] * mats * sizes["H"] * sizes["I"]
        result = {
            "shape": shape,
            "routing": routing,
            "tokens": args.tokens,
            "gpu": torch.cuda.get_device_name(),
            "native_ms": round(times["grouped_mm"], 2),
            "ours_ms": round(times["moe_accel"], 2),
            "ratio": round(times["grouped_mm"] / times["moe_accel"], 2),
            "ours_tflop_s": round(flops / times["moe_accel"] / 1e9),
            "native_kept_gib": round(kept["grouped_mm"], 2),
            "ours_kept_gib": round(kept["moe_accel"], 2),
            "largest_difference_of_a_norm": f"{worst:.1e}",
        }
        print(json.dumps(result), flush=True)
        if worst > 1e-2:
            raise SystemExit("outputs or gradients differ")
        with Path(os.environ.get("OUT", "."), "experts_speed.jsonl").open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        del module, inputs, found
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
