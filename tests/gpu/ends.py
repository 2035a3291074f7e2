"""Ranks that recorded blocks with experts end as any script may: NCCL waits for graphs that recorded its exchanges.

usage      python -m tests.gpu.ends [--gpus 2] [--device cpu]
prints     a line for each way to end; exit 1 where ranks failed, did not play what was recorded, or did not end in time
no GPU     --device cpu: over gloo, with what stands for graphs
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.gpu.processes import FSDP2, check_gpus, python_path, run_ranks

WAYS = {
    "returns": "nothing",
    "end_training": "accelerator.end_training()",
    "destroys": "torch.distributed.destroy_process_group()",
    "deletes": "del model, and destroy_process_group()",
}
LIMIT_S, STEPS = 120, 8
DONE = "played to the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="ranks, one a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rank", choices=WAYS, help="be one of the ranks, and end so")
    args = parser.parse_args()
    if args.rank:
        be_rank(args.rank, args.device)
        return
    check_gpus(args.gpus, args.device)
    failed = False
    for way, how in WAYS.items():
        command = [sys.executable, "-m", "tests.gpu.ends", "--device", args.device, "--rank", way]
        environment = FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "PYTHONPATH": python_path()}
        with tempfile.TemporaryDirectory() as folder:
            ended = run_ranks(command, args.gpus, environment, Path(folder), LIMIT_S)
        in_order = all(code == 0 for code in ended.codes) and all(DONE in each for each in ended.outputs)
        failed |= not in_order
        print(f"{way} ({how}): {'ended' if in_order else 'WRONG'}, exit {ended.codes}, {ended.seconds} s", flush=True)
        if not in_order:
            print(*(each[-3000:] for each in ended.outputs), sep="\n--\n")
    sys.exit(failed)


def be_rank(way: str, device: str) -> None:
    """Train a tiny model with everything recorded, and end."""
    if device == "cpu":
        import pytest

        from moe_accel.cpu import enable_fsdp_on_cpu
        from tests import pretended_graphs

        enable_fsdp_on_cpu()
        pretended_graphs.pretend(pytest.MonkeyPatch())
    import torch
    from accelerate import Accelerator
    from torch import distributed as dist

    from moe_accel import MoEConfig
    from moe_accel.experts import settings_of
    from moe_accel.graphs.agreement import Decision
    from tests.families import build_tiny, tiny_inputs, tiny_loss

    config = MoEConfig(ep_size=int(os.environ["WORLD_SIZE"]), dispatcher="alltoall", cuda_graphs=True)
    accelerator = Accelerator(parallelism_config=config)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_tiny("qwen3_moe", dtype, output_router_logits=True)  # which come out of what is played
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    for step in range(STEPS):
        inputs = tiny_inputs("qwen3_moe", 2, 32, 10 * step + dist.get_rank())
        loss = tiny_loss(model, {name: each.to(accelerator.device) for name, each in inputs.items()})
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    graphs = vars(model.model.layers[0].mlp)["_moe_accel_graphs"]
    transport = settings_of(model.model.layers[0].mlp.experts).of_known_sizes
    if device == "cuda":
        own = transport.group._get_backend(accelerator.device)
        assert own.options.is_high_priority_stream, "exchanges wait for what is computed beside them"
    if graphs.agreement.decision is Decision.PLAY and graphs.recording.num_played >= STEPS - 3:
        print(DONE, flush=True)
    if way == "end_training":
        accelerator.end_training()
    if way == "deletes":
        del model, optimizer, graphs, loss
        accelerator.free_memory()
    if way in ("destroys", "deletes"):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
