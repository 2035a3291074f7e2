"""Sizes of the bench's shapes, time, error and records for te_parts.py."""

import gc
import json
import statistics

import torch

from moe_accel.bench.shapes import SHAPES
from tests.gpu.timing import device_ms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 16_384 if DEVICE.type == "cuda" else 96
SCALE = 1 if DEVICE.type == "cuda" else 16
"""Without a GPU the script runs small, to see that it runs."""
NAMES = [name for name in SHAPES if name != "tiny"]
BF16 = torch.bfloat16
ROWS: list[dict] = []
MISSING: dict[str, str] = {}


class Sizes:
    """E experts, K top-k, H hidden, I inner, U up rows, heads, kv_heads, head_dim of a bench shape."""

    def __init__(self, name):
        values = SHAPES[name].values
        self.E = next(values[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in values)
        self.K, self.E = (
            values["num_experts_per_tok"],
            max(32, self.E) if "n_group" in values else max(8, self.E // SCALE),
        )
        inner = values.get("moe_intermediate_size", values["intermediate_size"])
        self.H, self.I = (each // SCALE // 8 * 8 for each in (values["hidden_size"], inner))
        self.gated = name != "nemotron-3-nano"
        self.U = 2 * self.I if self.gated else self.I
        self.heads, self.kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        self.head_dim = values.get("head_dim", values["hidden_size"] // self.heads)
        self.turned = name == "gpt-oss-20b"  # its weights are [E, in, out]
        self.sigmoid = name in ("nemotron-3-nano", "deepseek-v3")
        self.groups = (values["n_group"], values["topk_group"]) if "n_group" in values else None


def randn(*shape, std=1.0, dtype=BF16):
    return (torch.randn(*shape, device=DEVICE) * std).to(dtype)


def ms(function, rep=60):
    """Median time in ms, by the GPU's clock, with a cold L2 cache; the GPU is kept busy until the host has started all.

    `rep`: ms that are spent on it, about.
    """
    if DEVICE.type != "cuda":
        return device_ms(function)
    cold = torch.empty(2**26, dtype=torch.int32, device=DEVICE)
    for _ in range(3):
        function()

    def once():
        cold.zero_()
        return device_ms(function)

    return statistics.median([once() for _ in range(max(5, min(50, int(rep / once()))))])


def error(found, exact):
    """Relative, of all values together."""
    found, exact = found.detach().double(), exact.detach().double()
    return ((found - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def record(part, shape, what, **values):
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    if "ours_ms" in values and "te_ms" in values:
        rounded["ratio"] = round(values["ours_ms"] / values["te_ms"], 3)
    ROWS.append({"part": part, "shape": shape, "what": what, **rounded})
    print(json.dumps(ROWS[-1]), flush=True)


def free():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def told(failure):
    """The first line of an exception."""
    return f"{type(failure).__name__}: {(str(failure).strip() or 'without a message').splitlines()[0]}"
