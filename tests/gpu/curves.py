"""Loss curves on real text: native and moe_accel from the same weights over the same batches, and the noise of bf16.

usage      python tests/gpu/curves.py all|compare [--lora] [--layers N] [--batch N] [--sequence N] [--steps N] [--lr X]
           python tests/gpu/curves.py native|moe_accel [--order N] [...]
prints     of each run one JSON line with the loss of every step, appended to $OUT/curves.jsonl; `compare` (and `all` at
           its end) the relative differences of the curves as another. Without $OUT, the file is ./curves.jsonl

Qwen3-30B-A3B's layer shapes, random weights in bf16, one process, one GPU. Full: 4 layers, 4 x 1024, 50 steps, AdamW
1e-4. `--lora`: r = 16 on attention and all experts as in lora.py, 48 layers, 2 x 4096, 30 steps, AdamW 1e-3, gradient
checkpointing; an 80 GB card takes `--layers 12`. `--small` is for a try on a CPU.

The text is Python's own: the language reference in `pydoc_data.topics`, then the docstrings of the standard library's
modules, by name. A token is a word, a sign or white space; its id is its rank of first appearance. A model sees each
token once, as long as there are enough.

The noise is measured: native against native with the sequences within each batch in another order (`--order 1` and
`2`). The loss is the same number, the sums are rounded in another order. `within_noise` says whether moe_accel's curve
is, on average over the steps, no further from native's than the furthest two of native's own three are from each other.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics

import torch
from lora import with_adapters
from qwen3 import VOCABULARY, build_bf16, config

ORDERS = 0, 1, 2
"""Of the sequences in a batch: as they come, and two others."""
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DEFAULTS = {
    "full": {"layers": 4, "batch": 4, "sequence": 1024, "steps": 50, "lr": 1e-4},
    "lora": {"layers": 48, "batch": 2, "sequence": 4096, "steps": 30, "lr": 1e-3},
    "small": {"layers": 2, "batch": 4, "sequence": 64, "steps": 8, "lr": 3e-3},
}
SETTINGS = "lora", "small", *DEFAULTS["full"]
Curve = list[float]


def texts():
    """The topics, then the docstrings of each module of the standard library."""
    yield from (topics.topics[name] for name in sorted(topics.topics))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def batches(steps: int, batch: int, sequence: int, vocabulary: int) -> torch.Tensor:
    """[steps,batch,sequence] int64, the text from its beginning; from there again where it is too short."""
    needed, tokens = steps * batch * sequence, []
    for text in texts():
        tokens += re.findall(r"\w+|[^\w\s]|\s+", text)
        if len(tokens) >= needed:
            break
    rank = {word: number for number, word in enumerate(dict.fromkeys(tokens))}
    ids = itertools.islice(itertools.cycle([rank[word] % vocabulary for word in tokens]), needed)
    return torch.tensor(list(ids)).view(steps, batch, sequence)


def build(args: argparse.Namespace, device: str) -> torch.nn.Module:
    kinds = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    shapes = config(args.layers, max_position_embeddings=40_960, **kinds)
    for name, value in SMALL.items() if args.small else ():
        setattr(shapes, name, value)
    torch.manual_seed(0)
    model = build_bf16(shapes, device)
    if args.lora:
        model = with_adapters(model, experts=True)
        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def train(args: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    if args.arm == "moe_accel":
        from accelerate import Accelerator

        from moe_accel import MoEConfig

        kernels = "auto" if device == "cuda" else "fused"
        model, optimizer = Accelerator(parallelism_config=MoEConfig(kernels=kernels)).prepare(model, optimizer)
    text = batches(args.steps, args.batch, args.sequence, SMALL["vocab_size"] if args.small else VOCABULARY)
    generator = torch.Generator().manual_seed(args.order)
    losses = []
    for tokens in text:
        order = torch.randperm(args.batch, generator=generator) if args.order else torch.arange(args.batch)
        tokens = tokens[order].to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return {
        "arm": args.arm,
        "order": args.order,
        **{name: getattr(args, name) for name in SETTINGS},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "distinct_tokens": len(text.unique()),
        "text_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
        "losses": [round(loss.item(), 6) for loss in losses],
    }


def difference(one: Curve, other: Curve) -> dict[str, float]:
    """Of two curves: the largest and the mean |a - b| / b over the steps, and the step of the largest."""
    steps = [abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)]
    return {"max": max(steps), "mean": sum(steps) / len(steps), "step_of_max": steps.index(max(steps))}


def compare(runs: list[dict]) -> dict:
    """How far moe_accel's curve is from native's, beside how far native's own are from each other.

    Of runs of the same arm and order, the last counts. Raises ValueError where a run is missing, where two differ in
    more than arm and order, and where a loss is not finite.
    """
    last = {(run["arm"], run["order"]): run for run in runs}
    wanted = [("moe_accel", 0), *(("native", order) for order in ORDERS)]
    if missing := [f"{arm} --order {order}" for arm, order in wanted if (arm, order) not in last]:
        raise ValueError(f"no run of these settings in the file of: {', '.join(missing)}")
    for name in (*SETTINGS, "gpu", "torch", "text_sha256"):
        if len(values := {last[key][name] for key in wanted}) > 1:
            raise ValueError(f"runs of different {name} cannot be compared: {sorted(map(str, values))}")
    ours, *natives = (last[key]["losses"] for key in wanted)
    if not torch.tensor([ours, *natives]).isfinite().all():
        raise ValueError("a loss is not finite: nothing to compare")
    noise = [difference(other, one) for one, other in itertools.combinations(natives, 2)]
    found, floor = difference(ours, natives[0]), max(each["mean"] for each in noise)
    return {
        **{name: last["native", 0][name] for name in (*SETTINGS, "gpu")},
        "first_and_last_loss": {"native": [natives[0][0], natives[0][-1]], "moe_accel": [ours[0], ours[-1]]},
        "moe_accel_against_native": found,
        "native_against_native": noise,
        "mean_over_noise": round(found["mean"] / floor, 3) if floor else None,
        "within_noise": found["mean"] <= floor,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=["native", "moe_accel", "compare", "all"])
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--order", type=int, default=0, help="of the sequences in a batch; 0 is that of the text")
    for name, value in DEFAULTS["full"].items():
        parser.add_argument(f"--{name}", type=type(value))
    args = parser.parse_args()
    for name, value in DEFAULTS["small" if args.small else "lora" if args.lora else "full"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    file = Path(os.environ.get("OUT", "."), "curves.jsonl")
    if args.arm in ("native", "moe_accel"):
        line = json.dumps(train(args))
        with file.open("a") as lines:
            lines.write(line + "\n")
        print(line, flush=True)
        return
    if args.arm == "all":  # a process each: the memory of the last run is free
        for arm, order in [("moe_accel", 0), *(("native", order) for order in ORDERS)]:
            again = [sys.executable, __file__, arm, *sys.argv[2:], "--order", str(order)]
            subprocess.run(again, check=True)
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    same = [run for run in runs if all(run.get(name) == getattr(args, name) for name in SETTINGS)]
    print(json.dumps(compare(same)), flush=True)


if __name__ == "__main__":
    main()
