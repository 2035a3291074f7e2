"""Training throughput of a model of Qwen3-30B-A3B's shapes over several GPUs: an ordinary script, arms by config file.

usage      accelerate launch --config FILE tests/gpu/throughput.py NAME [--layers 12] [--batch 1] [--sequence 4096]
prints     one JSON line, also in $OUT/throughput.jsonl: ms per step (median of 10 after 4, the slowest rank's), tok/s
           per GPU, peak GiB per GPU, losses

Weights and optimizer states in bf16, AdamW inside the step, the model's own loss (`labels=`), router as it comes.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from qwen3 import VOCABULARY, build_bf16, config, timed_steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=4096)
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0)
    model = build_bf16(config(args.layers), accelerator.device)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    generator = torch.Generator().manual_seed(accelerator.process_index)
    tokens = torch.randint(VOCABULARY, (args.batch, args.sequence), generator=generator).to(accelerator.device)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    returned, times = timed_steps(step)
    losses = [accelerator.reduce(loss, "mean").item() for loss in returned]
    ours = torch.tensor([times[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30], device=accelerator.device)
    median_ms, peak_gib = accelerator.gather(ours[None]).amax(0).tolist()
    if accelerator.is_main_process:
        result = vars(args) | {
            "gpu": torch.cuda.get_device_name(),
            "gpus": accelerator.num_processes,
            "torch": torch.__version__,
            "median_ms": round(median_ms, 1),
            "tok_s_per_gpu": round(args.batch * args.sequence / median_ms * 1e3),
            "peak_gib": round(peak_gib, 2),
            "losses": [round(loss, 5) for loss in losses],
        }
        print(json.dumps(result), flush=True)
        with Path(os.environ.get("OUT", "."), "throughput.jsonl").open("a") as stream:
            stream.write(json.dumps(result) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
