"""A whole training step with each part of `te_parts` by TransformerEngine, beside `kernels: fused` and transformers.

usage      PYTHONPATH=FOLDER_WITH_TE:$PWD python3 -m tests.gpu.te_steps [SHAPE ...] [--arms ARM ...] [--seconds 500]
prints     a line for each arm as it ends, and a table; $OUT/te_steps.json

One process an arm, the same weights and tokens. Of each: median ms of 10 steps after 4, peak memory, the loss and the
gradient norm of the first step, the losses of all, and how far its gradients are from those of `native`: the relative
difference of all elements that were kept, and of the norms. FP8 is expected to be off by some per cent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

DEPTHS = {"qwen3-30b-a3b": (4, 16_384), "mixtral-8x7b": (2, 16_384), "deepseek-v3": (1, 8192), "gpt-oss-20b": (2, 8192)}
"""Layers and tokens by shape."""
ARMS = {
    "native": None,
    "fused": [],
    "permutation": ["permutation"],
    "router": ["router"],
    "norms": ["norms"],
    "attention": ["attention"],
    "fp8": ["fp8"],
    "experts": ["experts"],
    "norms, attention, fp8": ["norms", "attention", "fp8"],
}


def child(shape, arm, result):
    from accelerate import Accelerator

    from moe_accel import MoEConfig
    from moe_accel.bench import check, suites
    from moe_accel.bench.measure import peak_gib, timed
    from moe_accel.bench.options import Case
    from moe_accel.plugin import reports

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers, tokens = DEPTHS.get(shape, (2, 256))
    case = Case("full", shape, "random", layers, tokens, min(4096, tokens))
    model = suites.build(case, device, torch.bfloat16, 16, False)
    optimizer, said = suites.adamw(model), ""
    if arm != "native":
        how = {"kernels": "te", "te_parts": ARMS[arm]} if ARMS[arm] else {}
        accelerator = Accelerator(cpu=device.type == "cpu", parallelism_config=MoEConfig(**how))
        model, optimizer = accelerator.prepare(model, optimizer)
        said = str(reports(accelerator)[0])
    step = suites.trained_step(model, optimizer, case, device, model.config.vocab_size)
    loss = step.once(case.batch)
    found = check.fingerprint(loss.item(), step.named())
    model.zero_grad(set_to_none=True)
    del loss
    times, returned = timed(step.run, 4, 10, device)
    losses = [each.item() for each in returned]
    row = {"times_ms": times, "ms": statistics.median(times), **peak_gib(device), "losses": losses, "report": said}
    torch.save((found, row), result)


def differences(found, reference):
    """Of all kept elements, and of the norms, relative to the reference's."""
    total = square = 0.0
    norms = []
    for name, (norm, kept) in reference.tensors.items():
        other_norm, other = found.tensors[name]
        total += (other - kept).square().sum().item()
        square += kept.square().sum().item()
        norms.append(abs(other_norm - norm) / max(norm, 1e-30))
    return {
        "gradients_off": (total / square) ** 0.5,
        "norms_off": max(norms),
        "loss_off": abs(found.loss / reference.loss - 1),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--child", nargs=2, metavar=("ARM", "FILE"))
    args = parser.parse_args()
    if args.child:
        child(args.shapes[0], *args.child)
        return
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes or list(DEPTHS)[:3]:
            reference = None
            for arm in args.arms:
                if time.monotonic() - begun > args.seconds:
                    rows.append({"shape": shape, "arm": arm, "error": "not started: the seconds are over"})
                    continue
                file = Path(folder, "result.pt")
                file.unlink(missing_ok=True)
                command = [sys.executable, "-m", "tests.gpu.te_steps", shape, "--child", arm, str(file)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                row = {"shape": shape, "arm": arm, "layers": DEPTHS.get(shape, (2, 256))[0]}
                if file.exists():
                    found, measured = torch.load(file, weights_only=False)
                    reference = found if arm == "native" else reference
                    off = {} if reference is None else differences(found, reference)
                    row |= {"loss": found.loss, **off, **measured}
                else:
                    row["error"] = " ".join(done.stderr.strip().splitlines()[-3:]) or "nothing said"
                rows.append(row)
                print({k: v for k, v in row.items() if k not in ("times_ms", "losses")}, flush=True)
    show(rows)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    head = {"command": "python3 -m tests.gpu.te_steps", "gpu": gpu, "torch": torch.__version__}
    Path(os.environ.get("OUT", "."), "te_steps.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def show(rows):
    for row in rows:
        if "ms" not in row:
            print(f"{row['shape']:<16} {row['arm']:<24} {row['error']}")
            continue
        off = " ".join(f"{row.get(name, float('nan')):9.2e}" for name in ("loss_off", "gradients_off", "norms_off"))
        measured = f"{row['ms']:8.1f} ms {row['peak_gib'] or 0:6.1f} GiB  {row['losses'][-1]:.4f}"
        print(f"{row['shape']:<16} {row['arm']:<24} {measured}  {off}")


if __name__ == "__main__":
    main()
