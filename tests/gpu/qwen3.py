"""Qwen3-30B-A3B's layer shapes, and how a training step of them is timed: what the scripts beside this file share."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 151_936


def config(layers: int, vocabulary: int = VOCABULARY, **more: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        use_cache=False,
        **more,
    )


def build_bf16(config: Qwen3MoeConfig, device: torch.device | str) -> Qwen3MoeForCausalLM:
    """Random weights in bf16, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


def timed_steps(step: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """What 14 steps return, and the ms of the last 10, sorted; peak memory counts from the first of these."""
    returned, times = [], []
    for number in range(14):
        if number == 4:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        returned.append(step())
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return returned, sorted(times[4:])


def summary(args: argparse.Namespace, losses: list[torch.Tensor], norms: dict[str, float], times: list[float]) -> dict:
    """What a script prints of its steps: its arguments, the GPU, times (sorted ms), memory, losses and norms."""
    median_ms = times[len(times) // 2]
    return vars(args) | {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "median_ms": round(median_ms, 1),
        "min_ms": round(times[0], 1),
        "max_ms": round(times[-1], 1),
        "tok_s": round(args.batch * args.sequence / median_ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(loss.item(), 5) for loss in losses],
        "norms": norms,
    }


def profile_of(forward_backward: Callable[[], torch.Tensor], num_rows: int, width: int) -> str:
    """The kernels of one forward and backward that take longest, as a table."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        forward_backward()
        torch.cuda.synchronize()
    return prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=num_rows, max_name_column_width=width)
