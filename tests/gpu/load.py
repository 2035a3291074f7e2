"""Seconds and memory to load a Qwen3-30B-A3B-shaped checkpoint onto one GPU, beside transformers and the disk itself.

    python -m tests.gpu.load --folder /tmp/scratch --layers 42 --out load.json

Needs no network. Writes random bf16 weights in the hub's layout, 1.27 GB a layer (42 layers: 54 GB, which have to fit
the disk; the host need not hold them). Each arm runs in a process of its own; before each, and after writing, the
page cache is asked to let go of the files, and how fast they can be read without it is measured first.

    read      the files as they are, by eight threads into one buffer each: what the disk gives
    shards    from_pretrained, then prepare(): straight to the GPU
    cuda      transformers: from_pretrained(device_map="cuda")
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.dist.load_memory import peak_bytes, write_checkpoint

SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "intermediate_size": 6144,
    "tie_word_embeddings": False,
}
SMALL = SIZES | {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "vocab_size": 512, "head_dim": 16}
ARMS = ("read", "shards", "cuda")


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the pages of the files; it keeps those that are not written yet, hence the sync."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(folder: Path) -> int:
    """Read every file once, on eight threads; returns the bytes."""

    def read(piece: tuple[Path, int]) -> int:
        file, start = piece
        buffer, descriptor = bytearray(16 << 20), os.open(file, os.O_RDONLY)
        done, end = start, min(start + (1 << 28), file.stat().st_size)
        while done < end:
            done += os.preadv(descriptor, [memoryview(buffer)[: min(len(buffer), end - done)]], done)
        os.close(descriptor)
        return end - start

    files = sorted(folder.glob("*.safetensors"))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, 1 << 28)]
    with ThreadPoolExecutor(8) as threads:
        return sum(threads.map(read, pieces))


def be_arm(arm: str, folder: Path) -> None:
    """Run one arm in this process and print one JSON line."""
    result: dict[str, Any] = {"arm": arm}
    if arm == "read":
        start = time.perf_counter()
        num_bytes = read_files(folder)
        result |= {"seconds": time.perf_counter() - start, "bytes": num_bytes}
    else:
        import torch
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401 so that its import is not timed

        from moe_accel import MoEConfig

        accelerator = Accelerator(parallelism_config=MoEConfig())
        torch.zeros(1, device=accelerator.device)
        before, start = peak_bytes(), time.perf_counter()
        how = {"device_map": accelerator.device.type} if arm == "cuda" else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)
        if arm == "shards":
            model = accelerator.prepare(model)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        result |= {"seconds": time.perf_counter() - start, "peak_host_bytes": peak_bytes() - before}
        result["bytes"] = sum(each.numel() * each.element_size() for each in model.parameters())
        result["checksum"] = sum(each.float().abs().sum().double().item() for each in model.parameters())
        if accelerator.device.type == "cuda":
            result |= {"gpu": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    result["gb_s"] = result["bytes"] / result["seconds"] / 1e9
    print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/moe_accel_load"), help="scratch, removed afterwards")
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--small", action="store_true", help="tiny matrices, to try the script")
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--limit-s", type=float, default=520, help="no arm starts or runs on past this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm")
    arguments = parser.parse_args()
    checkpoint = arguments.folder / "qwen3_30b_random"
    if arguments.arm:
        be_arm(arguments.arm, checkpoint)
        return
    begin, rows = time.perf_counter(), []
    try:
        total = write_checkpoint(checkpoint, arguments.layers, SMALL if arguments.small else SIZES, 4 << 30)
        written_s = time.perf_counter() - begin
        print(f"{total / 1e9:.1f} GB written in {written_s:.0f} s", flush=True)
        for arm in arguments.arms:
            left_s = arguments.limit_s - (time.perf_counter() - begin)
            if left_s < 10:
                rows.append({"arm": arm, "skipped": "no time left"})
                continue
            drop_cache(checkpoint)
            command = [sys.executable, "-m", "tests.gpu.load", "--folder", str(arguments.folder), "--arm", arm]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left_s)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                failed = {"arm": arm, "failed": done.stderr[-2000:]}
                rows.append(json.loads(lines[0].removeprefix("RESULT ")) if lines else failed)
            except subprocess.TimeoutExpired:
                rows.append({"arm": arm, "skipped": f"not done after {left_s:.0f} s"})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.out:
                told = {"checkpoint_bytes": total, "layers": arguments.layers, "written_s": written_s, "rows": rows}
                arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


if __name__ == "__main__":
    main()
