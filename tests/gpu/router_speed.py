"""Routers of transformers beside themselves with what follows the linear layer fused: forward and backward.

usage      python3 -m tests.gpu.router_speed [--rounds 30] [--tiles 1024 2048 4096] [--out router_speed.json]
prints     one JSON line for each shape and dtype: ms between two CUDA events (median of the rounds, the GPU kept busy
           beforehand so that starting kernels is not in it) of what follows the linear layer (`route`), forward and
           backward, of the whole router, forward and backward, and host microseconds of its forward; the largest
           difference of weights, and the share of tokens with the same experts (in bf16 scores tie). Both take turns
           in every round. `tile_*_ms`: the kernels alone with so many elements a program.

Without a GPU it runs small, to see that it runs: a few tokens, no kernels.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_accel.experts.router import proof_of
from moe_accel.experts.router_proof import fuse_router
from moe_accel.kernels import router
from tests.gpu.timing import device_ms, host_us

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

SHAPES: dict[str, tuple[Any, Any]] = {
    "qwen3-30b-a3b": (
        Qwen3MoeTopKRouter,
        lambda: Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, hidden_size=2048),
    ),
    "mixtral-8x7b": (MixtralTopKRouter, lambda: MixtralConfig(num_local_experts=8, hidden_size=4096)),
    "gpt-oss-20b": (
        GptOssTopKRouter,
        lambda: GptOssConfig(num_local_experts=32, num_experts_per_tok=4, hidden_size=2880),
    ),
    "deepseek-v3": (DeepseekV3TopkRouter, lambda: DeepseekV3Config(n_routed_experts=256, hidden_size=7168)),
}
NUM_TOKENS = 16_384 if ON_GPU else 64


def build(shape: str, dtype: torch.dtype, device: str = "cuda") -> Any:
    """A router with random weights, and corrections in fp32 as models keep them."""
    kind, config = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    module = kind(config())
    for each in module.parameters():
        each.data = torch.randn(each.shape, generator=generator) * each.shape[-1] ** -0.5
    for each in module.buffers():
        each.data = torch.randn(each.shape, generator=generator) / 10
    module.requires_grad_().to(device)
    for each in module.parameters():
        each.data = each.data.to(dtype)
    return module


def original(module: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows a router's linear layer, by its own function: its linear layer gives these logits."""
    linear = torch.nn.functional.linear
    torch.nn.functional.linear = lambda *_: logits
    try:
        _, weights, experts = module(module.weight)  # any tokens of its width; in fp32, where nothing is cast
    finally:
        torch.nn.functional.linear = linear
    return weights, experts


def one_round(own: Any, fused: Any, x: torch.Tensor, tiles: list[int]) -> dict[str, float]:
    """Times of both ways for tokens x [N,H], and how far they are apart."""
    found: dict[str, float] = {}
    proof, plain = proof_of(fused), copy.deepcopy(own).float()
    with torch.no_grad():
        logits, weights, _ = own(x)
    assert proof is not None
    leaf, bias, dtype = logits.clone().requires_grad_(), proof.bias(own, ()), weights.dtype
    gradient = torch.randn(weights.shape, device=x.device).to(dtype)
    how = bias, proof.rule, dtype
    ways = {"torch": (lambda: original(plain, leaf), own), "fused": (lambda: router.route(leaf, *how), fused)}
    results = []
    for name, (way, module) in ways.items():

        def backward(weights: torch.Tensor) -> float:
            return device_ms(lambda: weights.backward(gradient))

        def forward(module: Any = module) -> Any:
            return module(x)

        found[f"{name}_route_forward_ms"] = device_ms(way)
        weights, experts = way()
        results.append((weights.detach().float(), experts))
        found[f"{name}_route_backward_ms"] = backward(weights)
        found[f"{name}_forward_ms"] = device_ms(forward)
        found[f"{name}_forward_host_us"] = host_us(forward)
        found[f"{name}_backward_ms"] = backward(forward()[1])
        leaf.grad = x.grad = None
        module.zero_grad(set_to_none=True)
    (weights, experts), (ours, chosen) = results
    (experts, order), (chosen, our_order) = experts.sort(1), chosen.sort(1)
    same = (experts == chosen).all(1)
    away = (weights.gather(1, order) - ours.gather(1, our_order))[same].abs()
    found["largest_difference"] = float(away.max()) if same.any() else float("nan")
    found["same_experts"] = float(same.float().mean())
    default = router.TILE
    for tile in tiles:
        router.TILE = tile
        try:
            found |= alone(logits, gradient, how, tile)
        finally:
            router.TILE = default
    return found


def alone(logits: torch.Tensor, gradient: torch.Tensor, how: Any, tile: int) -> dict[str, float]:
    """Times of the two kernels with so many elements a program."""
    rule = how[1]
    dense = None if rule.sigmoid or rule.renormalise else logits
    _, experts, scores = router.route_triton(logits, *how)
    back = gradient, scores, experts, dense, rule, logits.shape[1], logits.dtype
    router.route_backward_triton(*back)
    return {
        f"tile_{tile}_forward_ms": device_ms(lambda: router.route_triton(logits, *how)),
        f"tile_{tile}_backward_ms": device_ms(lambda: router.route_backward_triton(*back)),
    }


def measure(shape: str, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of one shape."""
    own = build(shape, dtype, DEVICE)
    fused = copy.deepcopy(own)
    proof = fuse_router(fused)
    assert proof is not None, f"nothing is proven of {type(own).__name__}"
    generator = torch.Generator(DEVICE).manual_seed(0)
    num_experts, width = own.weight.shape
    rounds = []
    for _ in range(args.rounds + 3):  # the first three compile and warm up
        x = torch.randn(NUM_TOKENS, width, device=DEVICE, generator=generator).to(dtype).requires_grad_()
        rounds.append(one_round(own, fused, x, args.tiles if ON_GPU else []))
    medians = {name: round(statistics.median(each[name] for each in rounds[3:]), 7) for name in rounds[-1]}
    parts = ("route_forward", "route_backward", "forward", "backward")
    ratios = {f"ratio_{each}": round(medians[f"torch_{each}_ms"] / medians[f"fused_{each}_ms"], 2) for each in parts}
    sizes = {"shape": shape, "tokens": NUM_TOKENS, "experts": num_experts, "top_k": proof.rule.top_k, "hidden": width}
    return sizes | {"dtype": str(dtype).removeprefix("torch."), "rule": str(proof.rule)} | medians | ratios


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tiles", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if ON_GPU else "none"
    result: dict[str, Any] = {"gpu": name, "torch": torch.__version__, "rows": []}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            result["rows"].append(measure(shape, dtype, args))
            print(json.dumps(result["rows"][-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
