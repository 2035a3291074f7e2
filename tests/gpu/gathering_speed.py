"""A layer's experts with GEMMs that gather their rows, beside GEMMs of gathered rows, forward and backward.

usage      python3 -m tests.gpu.gathering_speed [SHAPE ...] [--tokens 4096,16384,32768] [--seconds 200]
prints     ms of both (median of five turns, each the median of many), their ratio, how far outputs and gradients are
           apart, and ms that the host takes to start one; $OUT/gathering_speed.json

Both are `gated_experts`; the second by `experts/gathered.py`, whether it would be chosen or not.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from moe_accel.experts import gated, gathered
from moe_accel.experts.routing import sort_by_expert
from tests.gpu.timing import device_ms, host_us

SHAPES = {  # K, E, H, I
    "qwen3-30b-a3b": (8, 128, 2048, 768),
    "mixtral-8x7b": (2, 8, 4096, 14_336),
    "deepseek-v3 / 4": (8, 64, 7168, 2048),
    "qwen3-coder-480b / 4": (8, 40, 6144, 2560),
}
ROUTINGS = ("random", "zipf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16


def measured(shape, routing, num_tokens):
    top_k, num_experts, hidden, inner = SHAPES[shape]
    torch.manual_seed(0)
    scores = -torch.empty(num_tokens, num_experts, device=DEVICE).exponential_().log()
    if routing == "zipf":
        scores = scores - torch.arange(1, num_experts + 1, device=DEVICE).log()
    routes = sort_by_expert(scores.topk(top_k).indices, num_experts)
    up = torch.empty(num_experts, 2 * inner, hidden, device=DEVICE, dtype=BF16).normal_(0, 0.02).transpose(1, 2)
    down = torch.empty(num_experts, hidden, inner, device=DEVICE, dtype=BF16).normal_(0, 0.02).transpose(1, 2)
    x, gradient = (torch.randn(num_tokens, hidden, device=DEVICE).to(BF16) for _ in range(2))
    leaves = [each.requires_grad_() for each in (x, up, down, torch.rand(num_tokens * top_k, device=DEVICE))]

    def step(function):
        output = function(*leaves, routes)
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    ways = {"apart": gated.gated_experts, "gathered": gathered.gathered_experts}
    found = {name: step(way) for name, way in ways.items()}
    pairs = zip(found["gathered"], found["apart"], strict=True)
    off = [((one.float() - other.float()).norm() / other.float().norm()).item() for one, other in pairs]
    if not all(each < 1e-2 for each in off):
        raise SystemExit(f"outputs or gradients differ: {off}")
    found.clear()
    turns = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            turns[name].append(statistics.median(device_ms(lambda way=way: step(way)) for _ in range(8)))
    row = {f"{name}_ms": statistics.median(values) for name, values in turns.items()}
    row |= {f"{name}_host_ms": host_us(lambda way=way: step(way)) / 1e3 for name, way in ways.items()}
    row["ratio"] = row["apart_ms"] / row["gathered_ms"]
    tflop = 18 * num_tokens * top_k * hidden * inner / 1e9
    rates = {f"{name}_tflop_s": tflop / row[f"{name}_ms"] for name in ways}
    return {"shape": shape, "routing": routing, "tokens": num_tokens, **row, **rates, "off": off, "turns": turns}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--seconds", type=float, default=200)
    args = parser.parse_args()
    begun, rows = time.monotonic(), []
    for shape in args.shapes or list(SHAPES)[:3]:
        for num_tokens in map(int, args.tokens.split(",")):
            for routing in ROUTINGS:
                if time.monotonic() - begun > args.seconds:
                    print(f"{shape} {num_tokens} {routing}: not started, the seconds are over")
                    continue
                rows.append(measured(shape, routing, num_tokens))
                shown = {name: f"{value:.4g}" for name, value in rows[-1].items() if isinstance(value, float)}
                print(shape, num_tokens, routing, shown, flush=True)
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    head = {"command": "python3 -m tests.gpu.gathering_speed", "gpu": gpu, "torch": torch.__version__}
    Path(os.environ.get("OUT", "."), "gathering_speed.json").write_text(
        json.dumps(head | {"rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
