"""Memory and time of saving a sharded model: every rank its own part, beside gathering it on rank 0.

needs:     memory for about three times the model, disk for it once; no GPU
run:       python examples/save_speed.py --gb 5 --ranks 2,4 --out examples/save_speed.json
tested on: 2 cores, 23 GB of memory, torch 2.13.0; numbers in the README

A model of Qwen3-30B-A3B's shapes with as many layers as fit, bf16, FSDP2 with experts over all ranks (gloo).
Each arm is a fresh set of processes. Memory is the operating system's: VmHWM, reset before the save, above VmRSS before
it, of the rank that needs most. Time is until everything is on the disk.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
VOCABULARY, HIDDEN, INNER, EXPERTS = 151936, 2048, 768, 128


def main() -> None:
    """Run all arms, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    args = parser.parse_args()
    layer_bytes = 2 * EXPERTS * 3 * INNER * HIDDEN
    num_layers = max(1, round((args.gb * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    rows = [
        measure(arm, ranks, num_layers, args.folder)
        for ranks in map(int, args.ranks.split(","))
        for arm in ("gathered", "moe-accel")
    ]
    print("| ranks | save | GB | peak above training, MiB | seconds |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['ranks']} | {row['arm']} | {row['gb']:.2f} | {row['extra_mib']:.0f} | {row['seconds']:.1f} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(arm: str, num_ranks: int, num_layers: int, folder: Path) -> dict:
    """One arm in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = Path(tempfile.mkdtemp(dir=folder))
    launch = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "MOE_ACCEL_CONFIG": json.dumps({"ep_size": num_ranks}),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        command = [sys.executable, __file__, "--rank", arm, str(num_layers), str(out)]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num_ranks)
        ]
        codes = [rank.wait() for rank in ranks]
        results = [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]
        if any(codes):
            print(f"exit codes {codes} after the save", file=sys.stderr)  # gloo may abort at exit
        saved = sum(file.stat().st_size for file in (out / "model").glob("*.safetensors"))
        return {
            "arm": arm,
            "ranks": num_ranks,
            "layers": num_layers,
            "gb": saved / 1e9,
            "files": len(list((out / "model").glob("*.safetensors"))),
            "extra_mib": max(each["extra_mib"] for each in results),
            "seconds": max(each["seconds"] for each in results),
            "by_rank": results,
        }
    finally:
        shutil.rmtree(out)


def be_rank(arm: str, num_layers: int, out: Path) -> None:
    """Prepare the model, then save it and write down what that took."""
    import torch
    from accelerate import Accelerator
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    accelerator = Accelerator()
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    config.head_dim = 128
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    if accelerator.is_main_process:  # the other ranks get their shards from this one, and touch no page of their own
        for parameter in model.parameters():
            parameter.data.view(-1).view(torch.int16).random_(0x3C00, 0x3D00)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    accelerator.wait_for_everyone()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory_mib("VmRSS")
    started = time.perf_counter()
    if arm == "moe-accel":
        accelerator.save_model(model, out / "model", max_shard_size="2GB")
    else:
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            model.save_pretrained(out / "model", state_dict=weights, max_shard_size="2GB")
        accelerator.wait_for_everyone()
    os.sync()
    seconds = time.perf_counter() - started
    peak = memory_mib("VmHWM")
    result = {"training_mib": before, "peak_mib": peak, "extra_mib": peak - before, "seconds": seconds}
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    os._exit(0)


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        be_rank(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
