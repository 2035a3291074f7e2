"""Attention of one layer, forward and backward: transformers' way beside ours, of rows without padding.

usage      python -m tests.gpu.attention_speed [--rounds 10] [--out FILE]
prints     a line for each shape: medians in ms, and the largest relative difference of out and gradients
writes     FILE: all of it as JSON

Transformers' way is its eager attention where there are sinks, sdpa under a mask where there is a window, else causal
sdpa. Differences are of bf16: both round.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from moe_accel.padding.attention import Packed, attend
from moe_accel.padding.rows import of_batch
from tests.gpu.timing import device_ms

SHAPES: dict[str, tuple[int, int, int, int, int, int | None, bool]] = {
    "gpt-oss-20b, all tokens": (2, 4096, 64, 8, 64, None, True),
    "gpt-oss-20b, window 128": (2, 4096, 64, 8, 64, 128, True),
    "32 and 8 heads of 128, window 1024": (4, 4096, 32, 8, 128, 1024, False),
    "24 and 8 heads of 128, window 512": (4, 4096, 24, 8, 128, 512, False),
    "32 and 8 heads of 128, window 4096": (2, 8192, 32, 8, 128, 4096, False),
    "qwen3-30b-a3b": (4, 4096, 32, 4, 128, None, False),
}
"""Rows, their tokens, heads of queries, of keys and values, their width, window, whether there are sinks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, shape in SHAPES.items():
        found[name] = row = measure(shape, args.rounds)
        print(f"{name}: {json.dumps(row)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(shape: tuple[int, int, int, int, int, int | None, bool], rounds: int) -> dict[str, float]:
    """Medians of both ways, and how far apart they are."""
    num_rows, length, q_heads, kv_heads, width, window, has_sinks = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def of(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16, generator=generator)

    tensors = [of(num_rows, length, heads, width).requires_grad_() for heads in (q_heads, kv_heads, kv_heads)]
    sinks = of(q_heads).requires_grad_() if has_sinks else None
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.sinks = q_heads // kv_heads, True, sinks  # type: ignore
    at = torch.arange(length, device="cuda")
    distance = at[:, None] - at
    seen = ((distance >= 0) & (distance < (window or length)))[None, None]
    scale = width**-0.5

    def theirs() -> Tensor:
        rows = [each.transpose(1, 2) for each in tensors]
        if has_sinks:
            mask = torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
            return eager_attention_forward(module, *rows, mask, scale)[0]
        return sdpa_attention_forward(module, *rows, seen if window else None, scaling=scale)[0]

    packed = Packed(of_batch(num_rows, length, torch.device("cuda")), window)

    def ours() -> Tensor:
        q, k, v = (each.flatten(0, 1).transpose(0, 1).unsqueeze(0) for each in tensors)
        return attend(q, k, v, packed, scale, sinks).unflatten(1, (num_rows, length))[0]

    gradient, wanted = of(num_rows, length, q_heads, width), [*tensors, *([sinks] if sinks is not None else [])]

    def both(way: Callable[[], Tensor]) -> list[Tensor]:
        out = way()
        return [out, *torch.autograd.grad(out, wanted, gradient)]

    results = {name: both(way) for name, way in (("transformers", theirs), ("ours", ours))}
    pairs = zip(*results.values(), strict=True)
    apart = max(float((one - other).float().norm() / one.float().norm()) for one, other in pairs)
    times: dict[str, list[float]] = {}
    for number in range(rounds + 3):
        for name, way in (("transformers_ms", theirs), ("ours_ms", ours)):
            took = device_ms(lambda way=way: both(way))
            if number >= 3:
                times.setdefault(name, []).append(took)
    return {name: round(statistics.median(each), 3) for name, each in times.items()} | {"apart": round(apart, 5)}


if __name__ == "__main__":
    main()
