"""Twenty bf16 steps of a model of Qwen3-30B-A3B's layer shapes, for comparing how they are spread over ranks.

usage      accelerate launch --config FILE tests/gpu/train_steps.py NAME [--layers 2] [--steps 20]
writes     $OUT/NAME.json (./NAME.json without OUT): losses and gradient norms of every step, ms per step, peak GiB

An ordinary script: whether FSDP2 is stock, or experts are spread, is in the config file alone.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from qwen3 import config
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    with torch.device(accelerator.device):
        model = Qwen3MoeForCausalLM(config(args.layers, args.vocabulary))
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    generator = torch.Generator().manual_seed(accelerator.process_index)
    shape = args.batch, args.sequence
    batches = [torch.randint(args.vocabulary, shape, generator=generator) for _ in range(4)]
    torch.cuda.reset_peak_memory_stats()
    losses, norms, seconds = [], [], []
    for step in range(args.steps):
        start = time.perf_counter()
        tokens = batches[step % len(batches)].to(accelerator.device)
        logits = model(input_ids=tokens).logits
        # in fp32, from the bf16 logits: FSDP2's output_dtype would round the model's own loss to three digits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        norms.append(float(norm))
        seconds.append(time.perf_counter() - start)
    if accelerator.is_main_process:
        result = {
            "name": args.name,
            "ranks": accelerator.num_processes,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "layers": args.layers,
            "losses": losses,
            "norms": norms,
            "median_ms": sorted(seconds)[len(seconds) // 2] * 1e3,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "moe_config": os.environ.get("MOE_ACCEL_CONFIG"),
        }
        Path(os.environ.get("OUT", "."), f"{args.name}.json").write_text(json.dumps(result))
        shown = [round(loss, 5) for loss in losses[:3] + losses[-2:]]
        print(args.name, "losses", shown, f"{result['median_ms']:.0f} ms {result['peak_gib']:.1f} GiB", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
