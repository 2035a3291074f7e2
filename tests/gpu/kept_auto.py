"""`kept_layers: auto` beside 0: a LoRA step of Qwen3-30B-A3B's layer shapes, one process an arm, one GPU.

usage      python tests/gpu/kept_auto.py [--layers 48] [--batch 2] [--sequence 4096] [--steps 20] [--arms 0,auto]
           [--long 0]
prints     one JSON line an arm: layers kept in each step, median ms of the steps after the first ten, tok/s, peak GiB
           of those (as torch counts it, and reserved), retries of the allocator, losses; what the library says comes
           on stderr. Ends with a line that compares the arms.

r = 16 on attention and all experts, as `lora.py`. `--long N` adds five steps of N tokens a sequence at the end, and
says what is kept then: fewer, and nothing runs out of memory.
"""

import argparse
import gc
import json
import os
import subprocess
import sys

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

SETTLED = 10
"""Steps that may still measure or choose: two, one for the only kind of layer, and a few that correct the choice."""


def one_arm(args: argparse.Namespace, kept: int | str) -> dict:
    from accelerate import Accelerator
    from lora import with_adapters
    from one_gpu import build
    from qwen3 import VOCABULARY

    from moe_accel import MoEConfig

    model = with_adapters(build(args.layers), experts=True)
    layers = model.get_base_model().model.layers
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model, optimizer = Accelerator(parallelism_config=MoEConfig(kept_layers=kept)).prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1)

    def step(sequence: int) -> tuple[float, int]:
        """Loss, and how many layers were kept."""
        tokens = torch.randint(VOCABULARY, (args.batch, sequence), generator=generator).cuda()
        loss = model(input_ids=tokens, labels=tokens).loss
        num_kept = sum(not layer.gradient_checkpointing for layer in layers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), num_kept

    gc.collect()
    gc.freeze()
    found, times = [], []
    for number in range(args.steps):
        if number == SETTLED:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        found.append(step(args.sequence))
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    times = sorted(times[SETTLED:])
    median_ms = times[len(times) // 2]
    free, total = torch.cuda.mem_get_info()
    result = {
        "arm": kept,
        "layers": args.layers,
        "batch": args.batch,
        "sequence": args.sequence,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kept": [each[1] for each in found],
        "median_ms": round(median_ms, 1),
        "tok_s": round(args.batch * args.sequence / median_ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "free_gib": round(free / 2**30, 2),
        "total_gib": round(total / 2**30, 2),
        "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        "losses": [round(each[0].item(), 5) for each in found],
    }
    if args.long:
        longer = [step(args.long)[1] for _ in range(5)]
        again = step(args.sequence)[1]
        result |= {"long": args.long, "kept_long": longer, "kept_again": again}
        result["peak_long_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--long", type=int, default=0, help="tokens of five longer sequences at the end")
    parser.add_argument("--arms", default="0,auto")
    parser.add_argument("--arm", help="run this one alone, in this process")
    args = parser.parse_args()
    if args.steps <= SETTLED:
        parser.error(f"--steps must be more than {SETTLED}")
    if args.arm is not None:
        print(json.dumps(one_arm(args, args.arm if args.arm == "auto" else int(args.arm))), flush=True)
        return
    results = []
    for arm in args.arms.split(","):
        done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], stdout=subprocess.PIPE, text=True, check=True)
        line = done.stdout.strip().splitlines()[-1]
        print(line, flush=True)
        results.append(json.loads(line))
    first, last = results[0], results[-1]
    gap = max(abs(one - other) for one, other in zip(first["losses"], last["losses"], strict=True))
    compared = {"arms": [first["arm"], last["arm"]], "faster": round(first["median_ms"] / last["median_ms"], 3)}
    print(json.dumps(compared | {"largest_gap_of_losses": round(gap, 5)}), flush=True)


if __name__ == "__main__":
    main()
