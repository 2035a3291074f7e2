"""What loading a checkpoint costs each rank: host memory and seconds, by shards and as transformers and accelerate do.

    python -m tests.dist.load_memory --folder /tmp/scratch --out tests/results/load_memory.json

Writes a Qwen3-shaped checkpoint of random bf16 weights in the hub's layout (one tensor per expert), then starts gloo
ranks, each of which runs `from_pretrained` and `accelerator.prepare`, and reads its peak from the operating system
(VmHWM of /proc/self/status), before and after. No rank shares memory with another.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.processes import free_port

LAYER = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 4}
REST = {
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "intermediate_size": 1024,
    "tie_word_embeddings": False,
}
SHARD_BYTES = 1 << 30
ARMS = ("shards", "stock", "stock ram_efficient")


def write_checkpoint(folder: Path, num_layers: int, sizes: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Write files, index and config.json; the noise of a matrix is cut from one block. Returns bytes of weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True)
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=num_layers, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"]
    )
    config.save_pretrained(folder)
    noise = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    hidden, inner, head = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        for name, heads in (("q", sizes["num_attention_heads"]), ("k", sizes["num_key_value_heads"])):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (heads * head, hidden)
            shapes[f"{at}.self_attn.{name}_norm.weight"] = (head,)
        shapes[f"{at}.self_attn.v_proj.weight"] = (sizes["num_key_value_heads"] * head, hidden)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, sizes["num_attention_heads"] * head)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{at}.mlp.gate.weight"] = (sizes["num_experts"], hidden)
        for expert in range(sizes["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                shapes[f"{at}.mlp.experts.{expert}.{name}.weight"] = (inner, hidden)
            shapes[f"{at}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (sizes["vocab_size"], hidden)}

    weight_map, batch, batch_bytes, total, number = {}, {}, 0, 0, 0

    def flush() -> None:
        nonlocal number, batch, batch_bytes
        if batch:
            number += 1
            name = f"model-{number:05d}.safetensors"
            save_file(batch, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(batch, name))
            batch, batch_bytes = {}, 0

    start = 0
    for name, shape in shapes.items():
        numel = int(torch.Size(shape).numel())
        start = (start + 4099) % (1 << 16)
        repeats = -(-(numel + start) // len(noise))
        values = (noise if repeats == 1 else noise.repeat(repeats))[start : start + numel]
        batch[name] = values.reshape(shape).clone()
        batch_bytes, total = batch_bytes + 2 * numel, total + 2 * numel
        if batch_bytes >= shard_bytes:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_bytes() -> int:
    """Largest resident memory that this process has had, as the kernel counts it: mapped files count too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def be_rank(folder: Path) -> None:
    """Load and prepare, then print one JSON line with what it took."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401 so that its import is not timed

    accelerator = Accelerator()
    accelerator.wait_for_everyone()
    before, start = peak_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = time.perf_counter()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    accelerator.wait_for_everyone()
    end = time.perf_counter()
    shards = [each.to_local() if hasattr(each, "to_local") else each for each in model.parameters()]  # pyright: ignore
    result = {
        "rank": accelerator.process_index,
        "shard_bytes": sum(each.numel() * each.element_size() for each in shards),
        "peak_over_start_bytes": peak_bytes() - before,
        "from_pretrained_s": loaded - start,
        "total_s": end - start,
        "checksum": sum(each.double().sum().item() for each in shards),
    }
    print("RESULT " + json.dumps(result), flush=True)
    accelerator.wait_for_everyone()
    os._exit(0)


def measure(folder: Path, arm: str, num_ranks: int, ep_size: int) -> dict[str, Any]:
    """Start the ranks of one arm and collect what they print."""
    port = free_port()
    environment = {
        **os.environ,
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(arm == "stock ram_efficient").lower(),
        "MOE_ACCEL_CONFIG": json.dumps({"ep_size": ep_size}),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "LOAD_ARM": arm,
    }
    command = [sys.executable, "-m", "tests.dist.load_memory", "--rank-of", str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    results = []
    for process in ranks:
        out, err = process.communicate(timeout=900)
        lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
        if not lines:
            for other in ranks:
                other.kill()
            raise SystemExit(f"a rank of {arm} gave no result:\n{err[-4000:]}")
        results.append(json.loads(lines[0].removeprefix("RESULT ")))
    gib = 1 << 30
    row = {
        "arm": arm,
        "num_ranks": num_ranks,
        "ep_size": ep_size,
        "shard_gib": max(each["shard_bytes"] for each in results) / gib,
        "peak_gib": [each["peak_over_start_bytes"] / gib for each in results],
        "from_pretrained_s": max(each["from_pretrained_s"] for each in results),
        "total_s": max(each["total_s"] for each in results),
        "checksums": [each["checksum"] for each in results],
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch folder for the checkpoint, removed afterwards")
    parser.add_argument("--layers", type=int, default=20, help="layers of 0.2 GB each")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-of", type=Path)
    arguments = parser.parse_args()
    if arguments.rank_of:
        if os.environ["LOAD_ARM"] != "shards":
            from moe_accel.streaming import hook

            hook.is_wanted = lambda: False
        be_rank(arguments.rank_of)
        return
    checkpoint = arguments.folder / "qwen3_random"
    try:
        total = write_checkpoint(checkpoint, arguments.layers, LAYER | REST)
        print(f"{total / 1e9:.2f} GB of weights in {checkpoint}", flush=True)
        rows = [measure(checkpoint, arm, ranks, ranks) for ranks in arguments.ranks for arm in arguments.arms]
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"checkpoint_bytes": total, "rows": rows}, indent=1) + "\n")
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


if __name__ == "__main__":
    main()
