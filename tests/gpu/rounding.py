"""Whose bf16 is nearer to fp32: stock transformers' or moe-accel's, where their losses differ more than rounding does.

usage      python -m tests.gpu.rounding [--shape gpt-oss-20b] [--layers 3] [--batch 2] [--sequence 1024] [--steps 13]
           [--routing balanced]
no GPU     python -m tests.gpu.rounding --shape tiny --sequence 32 --layers 2
prints     the relative error of every kind of gradient of the first step, of their norm, and of the loss of every step
writes     with --out FILE the same as JSON

Full fine-tuning of random weights on one GPU. What both are compared with starts from the same bf16 weights, computes
forward and backward in fp32 with eager attention and an expert at a time, rounds the gradients to bf16, and then takes
the same step of AdamW on bf16 weights: what an arm is off by is its rounding in forward and backward (and that of
moe-accel's kernel for AdamW, which has fp32 where torch's has fp64). `--routing` as in `moe-accel bench`.
"""

import argparse
import copy
import gc
import json
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moe_accel import MoEConfig
from moe_accel.bench import flops, routing, suites
from moe_accel.bench.check import kind_of, plain_name
from moe_accel.bench.options import ROUTINGS, Case
from moe_accel.bench.shapes import SHAPES

ARMS = "stock", "moe_accel"
Gradients = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--routing", choices=ROUTINGS, default="random")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    losses, exact = trained(args, "fp32")
    found: dict[str, Any] = {"losses": {"fp32": losses}, "norms": {"fp32": norm_of(exact)}, "errors": {}}
    for arm in ARMS:
        losses, gradients = trained(args, arm)
        found["losses"][arm] = losses
        found["errors"][arm] = errors(gradients, exact)
        found["norms"][arm] = norm_of(gradients)
    print(table(found), flush=True)
    if args.out is not None:
        of = {name: getattr(args, name) for name in ("shape", "layers", "batch", "sequence", "steps", "routing")}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        of |= {"gpu": gpu, "torch": torch.__version__, "date": datetime.now(UTC).date().isoformat()}
        args.out.write_text(json.dumps(of | found, indent=1) + "\n")


def trained(args: argparse.Namespace, arm: str) -> tuple[list[float], Gradients]:
    """The loss of every step, and the first one's gradients, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case("full", args.shape, "random", args.layers, args.batch * args.sequence, args.sequence)
    held = suites.build(case, device, torch.bfloat16, 0, checkpointing=False)
    generator = torch.Generator().manual_seed(zlib.crc32(args.shape.encode()))
    shape = args.batch, args.sequence
    tokens = torch.randint(held.config.vocab_size, shape, generator=generator).to(device)
    optimizer, computes = suites.adamw(held), held
    if arm == "fp32":
        computes = copy.deepcopy(held).float()
        computes.set_attn_implementation("eager")
        computes.config._experts_implementation = "eager"
    elif arm == "moe_accel":
        accelerator = Accelerator(cpu=device.type == "cpu", parallelism_config=MoEConfig())
        computes, optimizer = accelerator.prepare(held, optimizer)
    block, experts = next(routing.experts_children(computes))
    routing.install(computes, args.routing, case.tokens, flops.top_k(block), flops.stack(experts).num_experts)
    losses, first = [], {}
    for _ in range(args.steps):
        loss = computes(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        first = first or {
            plain_name(name): each.grad.cpu() for name, each in computes.named_parameters() if each.grad is not None
        }
        pairs = list(zip(held.parameters(), computes.parameters(), strict=True)) if arm == "fp32" else []
        for rounded, whole in pairs:
            rounded.grad, whole.grad = whole.grad.to(rounded.dtype), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for rounded, whole in pairs:
                whole.copy_(rounded)
    del held, computes, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    return losses, first


def norm_of(gradients: Gradients) -> float:
    """Of all of them."""
    return sum(float(each.float().norm()) ** 2 for each in gradients.values()) ** 0.5


def errors(gradients: Gradients, exact: Gradients) -> dict[str, float]:
    """|g - exact| / |exact| of each kind: the same name in all layers."""
    if gradients.keys() != exact.keys():
        raise ValueError(f"not the same parameters have gradients: {sorted(gradients.keys() ^ exact.keys())}")
    squares: dict[str, list[float]] = {}
    for name, each in gradients.items():
        sums = squares.setdefault(kind_of(name), [0.0, 0.0])
        sums[0] += float((each.float() - exact[name].float()).norm()) ** 2
        sums[1] += float(exact[name].float().norm()) ** 2
    return {kind: (difference / whole) ** 0.5 if whole else 0.0 for kind, (difference, whole) in squares.items()}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| gradient, first step | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    of_kinds = [found["errors"][arm] for arm in ARMS]
    lines += [f"| {kind} | " + " | ".join(f"{each[kind]:.2e}" for each in of_kinds) + " |" for kind in of_kinds[0]]
    norms = [found["norms"][arm] / found["norms"]["fp32"] - 1 for arm in ARMS]
    of_fp32 = f"| norm of all, beside {found['norms']['fp32']:.4f} of fp32 | "
    lines.append(of_fp32 + " | ".join(f"{each:+.2e}" for each in norms) + " |")
    lines += ["", "| step | fp32 | " + " | ".join(f"{arm}, off by" for arm in ARMS) + " |"]
    lines.append("|---|---|" + "---|" * len(ARMS))
    for step, exact in enumerate(found["losses"]["fp32"]):
        off = [(found["losses"][arm][step] - exact) / exact for arm in ARMS]
        lines.append(f"| {step + 1} | {exact:.5f} | " + " | ".join(f"{each:+.2e}" for each in off) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
