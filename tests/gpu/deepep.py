"""DeepEP beside all-to-all and ep_size 1 on real GPUs: the same training, the same numbers, a clean end, and times.

usage      python tests/gpu/deepep.py --out FILE [--ranks 2] [--transports ep1,alltoall,buffer,elastic] [--steps 20]
prints     what differs, and milliseconds; exit 1 where something does
writes     FILE: all losses, norms, errors and times as JSON

Starts its own ranks, one set for each transport; with fewer GPUs than ranks they share. `buffer` and `elastic` are
`deep_ep.Buffer` and `deep_ep.ElasticBuffer`. Ranks that share a GPU need (their times mean nothing):
    LD_PRELOAD=$SITE/nvidia/nccl/lib/libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=4 NCCL_NVLS_ENABLE=0
and deep_ep 2.x there EP_DISABLE_GIN=1; everywhere EP_SUPPRESS_NCCL_CHECK=1 CUDA_HOME=/usr/local/cuda.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

from processes import FSDP2, LOSS_TOLERANCE, NORM_TOLERANCE, run_ranks

LIMIT_S = 240
"""Of one set of ranks."""

SCENARIOS = ("plain", "checkpointing", "skewed")

ROW_TOLERANCE = 2**-7
"""Of a sum of at most 8 bf16 rows, as a share of the largest: fp32 sums in another order, rounded once."""

LEAK = "destroy() was not called"


# ---- a rank


def rank_main(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from moe_accel.dispatch import topology

    shared = torch.cuda.device_count() < args.ranks
    if args.worker in ("buffer", "elastic"):
        import deep_ep

        if shared:
            deep_ep.Buffer.set_num_sms(8)
    result = {"training": {name: train(args, name) for name in SCENARIOS}}
    if args.worker != "ep1":
        device = torch.device("cuda", torch.cuda.current_device())
        found = topology.places(None, device)
        result["link"] = topology.worst_link(found[dist.get_rank()], found)
        result["rows"] = compare_rows(args, device)
        result["round_trip_ms"] = time_rows(args, device)
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "nccl": torch.cuda.nccl.version()}
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    dist.destroy_process_group()
    Path(args.folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))


def train(args: argparse.Namespace, scenario: str) -> dict:
    """Losses (mean over ranks), gradient norms and the report's line on the dispatcher."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, set_seed
    from qwen3 import config
    from torch.nn import functional
    from transformers import Qwen3MoeForCausalLM

    from moe_accel import MoEConfig, plugin

    AcceleratorState._reset_state()  # the process group stays; what it was called before FSDP has to be said again
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    ep_size = 1 if args.worker == "ep1" else args.ranks
    dispatcher = "alltoall" if args.worker in ("ep1", "alltoall") else "deepep"
    accelerator = Accelerator(
        mixed_precision="bf16", parallelism_config=MoEConfig(ep_size=ep_size, dispatcher=dispatcher)
    )
    assert accelerator.is_fsdp2
    set_seed(0)
    with torch.device(accelerator.device):
        model = Qwen3MoeForCausalLM(config(args.layers, vocabulary=32_000)).train()
    if scenario == "skewed":
        all_to_the_first(model)
    if scenario != "plain":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    generator = torch.Generator().manual_seed(accelerator.process_index)
    batches = [torch.randint(32_000, (2, 512), generator=generator) for _ in range(4)]
    losses, norms = [], []
    for step in range(args.steps):
        tokens = batches[step % len(batches)].to(accelerator.device)
        logits = model(input_ids=tokens).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    said = str(plugin.reports(accelerator)[0].dispatcher)
    accelerator.free_memory()
    del model, optimizer, logits, loss, accelerator
    gc.collect()
    torch.cuda.empty_cache()
    return {"losses": losses, "norms": norms, "dispatcher": said}


def all_to_the_first(model) -> None:
    """Let every token choose experts 0 to 7: all ranks but the first receive nothing."""
    import torch

    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[:, 0] = 0.0
            layer.mlp.gate.weight[:8, 0] = 1.0


def compare_rows(args: argparse.Namespace, device) -> dict[str, list[float]]:
    """Largest error of output, gradient of x and gradient of weights beside all-to-all, as shares of the largest."""
    import torch
    import torch.distributed as dist

    from moe_accel.dispatch import AllToAll

    group, rank = dist.group.WORLD, dist.get_rank()
    ours, truth = transport(args, group), AllToAll(group, 128 // args.ranks)
    errors = {}
    cases = {"1000 tokens": 1000, "uneven": 100 + 333 * rank, "no tokens on rank 1": 0 if rank == 1 else 700}
    cases |= {"no tokens at all": 0, "skewed": 512, "top-1": 300}
    for name, num_tokens in cases.items():
        generator = torch.Generator(device).manual_seed(rank)
        make = {"generator": generator, "device": device}
        x, upstream = torch.randn(2, num_tokens, 2048, **make).bfloat16()
        choices = torch.rand(num_tokens, 8 if name == "skewed" else 128, **make).argsort(1)[
            :, : 1 if name == "top-1" else 8
        ]
        weights = torch.rand(choices.shape, **make)
        results = []
        for each in (truth, ours):
            x_in, weights_in = x.clone().requires_grad_(), weights.clone().requires_grad_()
            x_r, choices_r, weights_r, handle = each.dispatch(x_in, choices, weights_in)
            assert handle.num_pairs == int((choices_r >= 0).sum()), "num_pairs is not the number of local choices"
            scale = (weights_r * (choices_r + 1).clamp(min=0) / 128).sum(1, keepdim=True)
            y = each.combine((x_r.float() * scale).bfloat16(), handle)
            y.backward(upstream)
            again = each.dispatch(x, choices, weights, handle)
            assert torch.equal(again[0], x_r), f"{name}: a repeated dispatch is not the first"
            results.append((y.detach().float(), x_in.grad.float(), weights_in.grad))
        errors[name] = [
            ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() if b.numel() else 0.0
            for b, a in zip(*results, strict=True)
        ]
    return errors


def time_rows(args: argparse.Namespace, device) -> dict[str, float]:
    import torch.distributed as dist

    from moe_accel.dispatch import choose

    ours = transport(args, dist.group.WORLD)
    traffic = choose.Traffic(128, 2048, 8)
    return {str(tokens): choose.round_trip_ms(ours, traffic, device, tokens) for tokens in (4096, 16_384)}


def transport(args: argparse.Namespace, group):
    from moe_accel.dispatch import AllToAll, DeepEP

    return (AllToAll if args.worker == "alltoall" else DeepEP)(group, 128 // args.ranks)


# ---- the ranks of all transports, one after the other


def run_set(args: argparse.Namespace, name: str) -> dict:
    """What rank 0 found, the slowest rank's times, and how the ranks ended."""
    kind = {"MOE_ACCEL_DEEPEP": name} if name in ("buffer", "elastic") else {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", folder]
        ranks = run_ranks(command, args.ranks, FSDP2 | kind, Path(folder), LIMIT_S)
        files = [Path(folder, f"{rank}.json") for rank in range(args.ranks)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
    ended = {"exit_codes": ranks.codes, "seconds": ranks.seconds}
    ended["leaked"] = sum(LEAK in output for output in ranks.outputs)
    if len(found) < args.ranks or any(ranks.codes):
        said = (output[-3000:] for output in ranks.outputs)
        print(f"--- {name} failed: exit codes {ranks.codes}", *said, sep="\n", flush=True)
        return ended | {"failed": True}
    result = found[0] | ended
    for key in ("rows", "round_trip_ms"):
        if key in result:
            result[key] = {case: worst([each[key][case] for each in found]) for case in result[key]}
    return result


def worst(values: list) -> list[float] | float:
    return [max(each) for each in zip(*values, strict=True)] if isinstance(values[0], list) else max(values)


def verdicts(results: dict[str, dict], baseline: str) -> list[str]:
    """What is wrong, as sentences."""
    wrong = []
    for name, result in results.items():
        if result.get("failed"):
            wrong.append(f"{name}: the ranks ended with {result['exit_codes']}")
            continue
        if result["leaked"]:
            wrong.append(f"{name}: a buffer was not destroyed")
        for case, errors in result.get("rows", {}).items():
            if not max(errors) <= ROW_TOLERANCE:
                wrong.append(f"{name}, rows, {case}: errors {errors}")
        truth = results[baseline]
        if name == baseline or truth.get("failed"):
            continue
        for scenario in SCENARIOS:
            loss, norm = differences(result, truth, scenario)
            if not (loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE):
                wrong.append(f"{name}, {scenario}: losses differ by {loss:.1e}, norms by {norm:.1e} from {baseline}")
    return wrong


def differences(tried: dict, truth: dict, scenario: str) -> tuple[float, float]:
    """Largest relative difference of a loss and of a norm over all steps."""
    ours, true = tried["training"][scenario], truth["training"][scenario]
    pairs = [zip(ours[what], true[what], strict=True) for what in ("losses", "norms")]
    loss, norm = (max(abs(a - b) / abs(b) for a, b in each) for each in pairs)
    return loss, norm


def show(results: dict[str, dict], baseline: str) -> None:
    print(
        f"\n{'transport':<10} {'ended':<12} " + " ".join(f"{name + ' loss, norm':<26}" for name in SCENARIOS) + " rows"
    )
    for name, result in results.items():
        if result.get("failed"):
            print(f"{name:<10} {result['exit_codes']}")
            continue
        cells = []
        for scenario in SCENARIOS:
            if results[baseline].get("failed"):
                cells.append(f"{result['training'][scenario]['losses'][-1]:.5f}")
            else:
                cells.append("{:.1e}, {:.1e}".format(*differences(result, results[baseline], scenario)))
        rows = max((max(errors) for errors in result.get("rows", {}).values()), default=0.0)
        print(f"{name:<10} {result['seconds']:<12} " + " ".join(f"{cell:<26}" for cell in cells) + f" {rows:.1e}")
        print(f"{'':<10} {result['training']['plain']['dispatcher']}")
    for name, result in results.items():
        if "round_trip_ms" in result:
            print(f"{name:<10} round trip ms {result['round_trip_ms']}, peak {result['peak_gib']:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--transports", default="ep1,alltoall,buffer,elastic")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return rank_main(args)
    names = args.transports.split(",")
    results: dict[str, dict] = {}
    for name in names:
        results[name] = run_set(args, name)
        print(f"{name}: {results[name]['seconds']} s, exit codes {results[name]['exit_codes']}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    show(results, names[0])
    wrong = verdicts(results, names[0])
    print("\n".join(["", *(f"WRONG  {each}" for each in wrong)] if wrong else ["", "all the same"]), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
