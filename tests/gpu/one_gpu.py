"""One arm, one process, one GPU: a full fine-tuning step of Qwen3-30B-A3B's layer shapes, optimizer inside.

usage      python tests/gpu/one_gpu.py native|compile|liger|moe_accel|graphs|reference
           [--layers 4] [--batch 4] [--sequence 4096]
prints     one JSON line: ms per step (median of 10 after 4), tok/s, peak GiB, losses, and gradient norms of the first
           step by kind of parameter

Same model, same weights, same tokens for every arm. `moe_accel` is `Accelerator(parallelism_config=MoEConfig())`,
`graphs` with `cuda_graphs=True`.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from qwen3 import VOCABULARY, build_bf16, config, profile_of, summary, timed_steps


def build(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    kinds = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    return build_bf16(config(layers, max_position_embeddings=40_960, **kinds), "cuda")


def norms_by_kind(model: torch.nn.Module) -> dict[str, float]:
    """Gradient norm of all layers' parameters of the same name together."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[name.split(".", 3)[-1]] += parameter.grad.float().square().sum().item()
    return {name: math.sqrt(square) for name, square in squares.items()}


def measured(
    args: argparse.Namespace,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    forward_backward: Callable[[], torch.Tensor],
) -> dict:
    """Train by steps, of which the first gives gradient norms and the last ten times: the summary of `qwen3.py`."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> torch.Tensor:
        loss = forward_backward()
        update()
        return loss

    losses = [forward_backward()]
    norms = norms_by_kind(model)
    update()
    more, times = timed_steps(step)
    return summary(args, losses + more, norms, times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=["native", "compile", "liger", "moe_accel", "graphs", "reference"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.arm == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe()
    model = build(args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if args.arm == "compile":
        model = torch.compile(model)
    if args.arm in ("moe_accel", "graphs", "reference"):
        from accelerate import Accelerator

        from moe_accel import MoEConfig

        kernels = "reference" if args.arm == "reference" else "auto"
        options = MoEConfig(kernels=kernels, cuda_graphs=args.arm == "graphs")
        model, optimizer = Accelerator(parallelism_config=options).prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (args.batch, args.sequence), generator=generator).cuda()

    def forward_backward() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    print(json.dumps(measured(args, model, optimizer, forward_backward)), flush=True)
    if args.profile:
        print(profile_of(forward_backward, num_rows=25, width=80))


if __name__ == "__main__":
    main()
