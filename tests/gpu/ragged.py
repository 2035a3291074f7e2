"""Ragged fine-tuning data on one GPU: 45 % of a batch is padding, 40 % of the rest are prompts without labels.

usage      python tests/gpu/ragged.py native|compile|moe_accel|moe_accel_padded
           [--layers 4] [--batch 8] [--micro 4] [--sequence 4096]
prints     one JSON line: ms per step (median of 10 after 4), useful tok/s (padding does not count), peak GiB, losses,
           and gradient norms of the first step by kind of parameter

A full fine-tuning step of Qwen3-30B-A3B's layer shapes, AdamW inside: `--batch` sequences in forwards of `--micro`,
since stock transformers needs 40 GB for the logits of four. Same model, weights and tokens for every arm;
`moe_accel_padded` is moe-accel with `padding_free: off`.
"""

import argparse
import json

import torch
from one_gpu import build, measured
from qwen3 import VOCABULARY

SHARES = (1.0, 0.6, 0.4, 0.2)
"""Of the longest sequence: 55 % on average."""
PROMPT = 0.4
"""Of each sequence, without labels."""


def ragged(batch: int, sequence: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels [B,T], padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (batch, sequence), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row in range(batch):
        length = round(SHARES[row % len(SHARES)] * sequence)
        prompt = round(PROMPT * length)
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    return {name: each.to(device) for name, each in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def parts_of(inputs: dict[str, torch.Tensor], micro: int) -> list[dict[str, torch.Tensor]]:
    """The forwards of one step, each divided by the labels of all, as Trainer does it."""
    num_items = (inputs["labels"][:, 1:] != -100).sum()
    parts = zip(*(each.split(micro) for each in inputs.values()), strict=True)
    return [{**dict(zip(inputs, part, strict=True)), "num_items_in_batch": num_items} for part in parts]


def prepared(arm: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """Model and optimizer of an arm."""
    if arm == "compile":
        return torch.compile(model), optimizer
    if arm == "native":
        return model, optimizer
    from accelerate import Accelerator

    from moe_accel import MoEConfig

    config = MoEConfig(padding_free="off" if arm == "moe_accel_padded" else "auto")
    return Accelerator(parallelism_config=config).prepare(model, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=["native", "compile", "moe_accel", "moe_accel_padded"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    args = parser.parse_args()
    if args.micro % len(SHARES) or args.batch % args.micro:
        parser.error(f"--micro is a multiple of {len(SHARES)}, --batch of --micro")
    model = build(args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer = prepared(args.arm, model, optimizer)
    inputs = ragged(args.batch, args.sequence, VOCABULARY, "cuda")
    parts = parts_of(inputs, args.micro)
    num_useful = int(inputs["attention_mask"].sum())

    def forward_backward() -> torch.Tensor:
        total = torch.zeros((), device="cuda")
        for part in parts:
            loss = model(**part).loss
            loss.backward()
            total += loss.detach()
        return total

    found = measured(args, model, optimizer, forward_backward)
    found["useful_tokens"] = num_useful
    found["useful_tok_s"] = round(num_useful / found["median_ms"] * 1e3)
    found["padding"] = round(1 - num_useful / (args.batch * args.sequence), 4)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
