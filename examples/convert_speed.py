"""How fast `moe-accel convert` is, beside `cp` and beside loading and saving with transformers.

needs:      disk space for three times the checkpoint; memory for transformers (twice the checkpoint)
run:        python examples/convert_speed.py --gb 4 --folder /a/disk
tested on:  2 shared cores, ext4 on a virtual disk

Writes a checkpoint of Qwen3-30B-A3B's shapes (128 experts, I 768, H 2048, as many layers as fit), then runs every
method in turn, `--runs` times, with the source evicted from the page cache (cold) and with it read before (warm), and
prints medians. Every method ends when its files are on the disk (fsync). The imports of transformers are not counted,
ours are.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERTS, INNER, HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 128, 768, 2048, 8192, 32, 4, 128
SHARD_BYTES = 600_000_000

TRANSFORMERS = """
import os, sys, time
import torch
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
for name in os.listdir(sys.argv[2]):
    fd = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(fd)
print(time.perf_counter() - start)
"""
CP = 'cp -r "$1" "$2" && sync "$2"/*'

OURS = [sys.executable, "-m", "moe_accel", "convert", "{source}", "{target}", "--json", "--to"]
METHODS = {
    "cp": ["sh", "-c", CP, "cp", "{source}", "{target}"],
    "stacked": [*OURS, "stacked"],
    "stacked, --verify header": [*OURS, "stacked", "--verify", "header"],
    "transposed (nemo)": [*OURS, "nemo"],
    "transposed, --verify header": [*OURS, "nemo", "--verify", "header"],
    "transformers load + save": [sys.executable, "-c", TRANSFORMERS, "{source}", "{target}"],
}


Results = dict[tuple[str, bool], list[tuple[float, float, float]]]
"""(method, whether cold) -> seconds, processor seconds and peak MB of each run."""


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    found["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = found[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
        found[f"{prefix}.self_attn.q_norm.weight"] = found[f"{prefix}.self_attn.k_norm.weight"] = (HEAD_DIM,)
        found[f"{prefix}.self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        found[f"{prefix}.self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        found[f"{prefix}.self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        found[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        found[f"{prefix}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for role in ("gate", "up"):
                found[f"{prefix}.mlp.experts.{expert}.{role}_proj.weight"] = (INNER, HIDDEN)
            found[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    return found


def write_checkpoint(folder: Path, gb: float) -> int:
    """Write the source, of about `gb` gigabytes; returns its bytes."""
    from moe_accel.convert.headers import make_header, num_bytes
    from moe_accel.convert.regions import Output, Tensor
    from moe_accel.convert.shards import INDEX, make_index, pack

    num_layers = max(1, round(gb * 1e9 / (3 * EXPERTS * INNER * HIDDEN * 2)))
    outputs = [Output(name, "BF16", shape, ()) for name, shape in shapes(num_layers).items()]
    folder.mkdir(parents=True)
    shards = pack(outputs, SHARD_BYTES, {"format": "pt"})
    noise = bytearray(os.urandom(1 << 20))
    noise[1::2] = bytes(0x3F & byte for byte in noise[1::2])  # finite numbers
    for shard in shards:
        tensors = {each.name: Tensor(each.name, each.dtype, each.shape) for each in shard.outputs}
        header, starts = make_header(tensors, {"format": "pt"})
        with open(folder / shard.name, "wb") as stream:
            stream.write(header)
            for at, name in enumerate(starts):
                size, shift = num_bytes("BF16", tensors[name].shape), at * 6151 % (1 << 19) * 2
                data = noise[shift:] + noise[:shift]
                for done in range(0, size, len(data)):
                    stream.write(data[: size - done])
            os.fsync(stream.fileno())
    if len(shards) > 1:
        (folder / INDEX).write_bytes(make_index(shards, None))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": num_layers,
        "num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(shard.file_bytes for shard in shards)


def heat(folder: Path, cold: bool) -> None:
    """Put the files of `folder` into the page cache, or out of it."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        if cold:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(fd, 16 << 20):
                pass
        os.close(fd)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak resident MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command[:6])}")
    if "transformers" in " ".join(command):
        seconds = float(printed.split()[-1])
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--runs", type=int, default=5, help="of each method, interleaved")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--skip", nargs="*", default=[], help=f"methods to leave out: {', '.join(METHODS)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        num_bytes = write_checkpoint(source, args.gb)
        names = [name for name in METHODS if name not in args.skip]
        results: Results = {}
        try:
            for _ in range(args.runs):
                run_round(names, source, target, results)
        except KeyboardInterrupt:
            print("interrupted: the table is of what was measured until then", file=sys.stderr)
        print_table(num_bytes, [name for name in names if (name, False) in results], results)


def run_round(names: list[str], source: Path, target: Path, results: Results) -> None:
    """Measure every method once cold and once warm."""
    for cold in (True, False):
        for name in names:
            os.sync()
            heat(source, cold)
            places = {"{source}": str(source), "{target}": str(target)}
            found = measure([places.get(each, each) for each in METHODS[name]])
            results.setdefault((name, cold), []).append(found)
            print(f"{'cold' if cold else 'warm'} {name}: {found[0]:.2f} s", file=sys.stderr)
            shutil.rmtree(target)


def print_table(num_bytes: int, names: list[str], results: Results) -> None:
    """Medians of what was measured."""
    runs = min(len(results[key]) for key in results if key[0] in names) if names else 0
    print(f"{num_bytes / 1e9:.2f} GB, median of {runs}, {os.cpu_count()} cores\n")
    print("| method | cold GB/s | warm GB/s | x cp cold | x cp warm | CPU s/GB | peak MB |")
    print("|---|---|---|---|---|---|---|")
    rate = {key: num_bytes / 1e9 / statistics.median(r[0] for r in each) for key, each in results.items()}
    for name in names:
        both = results[name, True] + results[name, False]
        cpu, peak = statistics.median(r[1] for r in both) / num_bytes * 1e9, max(r[2] for r in both)
        times = [rate[name, cold] / rate["cp", cold] if "cp" in names else 0 for cold in (True, False)]
        print(
            f"| {name} | {rate[name, True]:.2f} | {rate[name, False]:.2f} | {times[0]:.2f} | {times[1]:.2f} "
            f"| {cpu:.2f} | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
