"""Shared experts computed while tokens travel, and where they stand in the block: times of forward and backward.

usage      python -m tests.gpu.beside [--ranks 2] [--out FILE] [--shapes ...] [--transports alltoall,buffer,elastic]
no GPU     python -m tests.gpu.beside --device cpu --tokens 32 --steps 2       tiny sizes, over gloo
prints     a line for each shape, transport and way; exit 1 where losses or gradient norms differ
writes     FILE: all of it as JSON

One set of ranks for each transport and shape, ep_size = ranks. Both ways alternate in one process, on one model with
random weights in bf16 and no optimizer. `hidden` is the share of the time of kernels that move tokens (dispatch,
combine and their backward; NCCL's or DeepEP's) in which a kernel that computes ran too, of one profiled step of rank 0.
With fewer GPUs than ranks they share, times mean nothing, and NCCL needs what `deepep.py` says.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.processes import FSDP2, LOSS_TOLERANCE, NORM_TOLERANCE, python_path, run_ranks
from tests.gpu.timeline import Span, spans_of, union

LIMIT_S = 110
"""Of one set of ranks."""

ATTENTION = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 40_960}
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    # called after the experts: 64 of DeepSeek-V3's 256 experts
    "deepseek-v3": ("deepseek-v3", 2, {}),
    # called before the experts: Qwen1.5-MoE-A2.7B
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe",
        8,
        ATTENTION
        | {"hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1},
    ),
    # the same block with the experts of Qwen3.5-35B-A3B
    "qwen3.5-35b-a3b-experts": (
        "qwen2_moe",
        8,
        ATTENTION
        | {"hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
        | {"num_experts": 256, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
    ),
}
"""Shape of `moe-accel bench` or model type, layers, and the numbers of its config."""

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY |= {"num_experts_per_tok": 2, "intermediate_size": 32}
TINY_OF = {
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 32},
}

WAYS = {"in place": False, "moved": True}


# ---- a rank


def rank_main(args: argparse.Namespace) -> None:
    import torch
    from accelerate import Accelerator

    from moe_accel import MoEConfig
    from moe_accel.experts import find_experts, settings_of
    from moe_accel.plugin import reports

    device = own_device(args)
    model = build(args, device)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dispatcher = "alltoall" if args.worker == "alltoall" else "deepep"
    accelerator = Accelerator(parallelism_config=MoEConfig(ep_size=args.ranks, dispatcher=dispatcher))
    assert accelerator.is_fsdp2
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    found = [settings_of(module).beside for _, module in find_experts(model)]
    slots = [(beside.slot, beside.slot.name) for beside in found if beside is not None]
    rank = accelerator.process_index
    generator = torch.Generator().manual_seed(1 + rank)
    vocabulary, sequence = model.config.vocab_size, min(args.tokens, 4096)
    tokens = torch.randint(vocabulary, (args.tokens // sequence, sequence), generator=generator).to(device)

    def step(moved: bool) -> torch.Tensor:
        for slot, name in slots:
            slot.name = name if moved else ""
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    result = measured(args, model, step, device)
    result["said"] = [each for each in reports(accelerator)[0].notes if "shared experts" in each]
    if args.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        for way, moved in WAYS.items():
            step(moved)
            result["ways"][way]["hidden"] = hidden(spans_of(lambda moved=moved: step(moved)))
    Path(args.folder, f"{rank}.json").write_text(json.dumps(result))
    accelerator.end_training()


def own_device(args: argparse.Namespace) -> Any:
    """This rank's GPU, which it may share; on the CPU, accelerate is told that FSDP2 is possible."""
    import torch

    if args.device == "cpu":
        from moe_accel.cpu import enable_fsdp_on_cpu

        enable_fsdp_on_cpu()
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def build(args: argparse.Namespace, device: Any) -> Any:
    """The model, the same weights on every rank."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from moe_accel.bench.shapes import SHAPES as RELEASED
    from moe_accel.bench.suites import randomise

    name, layers, values = SHAPES[args.shape]
    model_type = RELEASED[name].model_type if name in RELEASED else name
    values = RELEASED[name].values | values if name in RELEASED else values
    values = values | {"vocab_size": 32_000, "num_hidden_layers": args.layers or layers, "use_cache": False}
    if args.device == "cpu":
        values |= TINY | TINY_OF[model_type] | {"vocab_size": 64, "num_hidden_layers": 2}
    config_class: Any = CONFIG_MAPPING[model_type]
    with torch.device(device):
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(
            config_class(**values), dtype=dtype, attn_implementation="sdpa"
        ).train()
    randomise(model)
    return model


def measured(args: argparse.Namespace, model: Any, step: Any, device: Any) -> dict[str, Any]:
    """Of each way: loss and gradient norms, then times, the ways taking turns."""
    import torch

    from tests.gpu.several_rank import between, gathered, gradient_norms, mark, mean, synchronize

    ways: dict[str, dict[str, Any]] = {}
    for way, moved in WAYS.items():
        loss = mean(step(moved)).item()
        ways[way] = {"loss": loss, "norms": gradient_norms(model), "ms": []}
        model.zero_grad(set_to_none=True)
    for number in range(args.steps + 2):
        for way, moved in WAYS.items():
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = mark(device)
            step(moved)
            end = mark(device)
            model.zero_grad(set_to_none=True)
            synchronize(device)
            if number >= 2:
                ways[way]["ms"].append(max(gathered(between(start, end))))
            if args.device == "cuda":
                ways[way]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {"ways": ways}


def hidden(spans: Sequence[Span]) -> float:
    """Share of the time of kernels that move tokens in which a kernel that computes ran; 0 without any."""
    kinds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for each in spans:
        name = each.name.lower()
        moves = any(word in name for word in ("sendrecv", "deep_ep", "intranode", "internode"))
        if moves or not ("nccl" in name or name.startswith(("memcpy", "memset"))):  # nccl: FSDP2's
            kinds[moves].append((each.start, each.start + each.duration))
    moving, computing = union(kinds[True]), union(kinds[False])
    both = sum(max(0.0, min(end, other) - max(start, first)) for start, end in moving for first, other in computing)
    total = sum(end - start for start, end in moving)
    return both / total if total else 0.0


# ---- all sets of ranks, one after the other


def run_set(args: argparse.Namespace, transport: str, shape: str) -> dict[str, Any]:
    more = {"MOE_ACCEL_DEEPEP": transport, "EP_SUPPRESS_NCCL_CHECK": "1"} if transport != "alltoall" else {}
    more |= {"PYTHONPATH": python_path(), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if args.device == "cpu":
        more |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.gpu.beside", *sys.argv[1:]]
        command += ["--worker", transport, "--shape", shape, "--folder", folder]
        ended = run_ranks(command, args.ranks, FSDP2 | more, Path(folder), LIMIT_S)
        file = Path(folder, "0.json")
        if any(ended.codes) or None in ended.codes or not file.exists():
            print(*(output[-3000:] for output in ended.outputs), sep="\n---\n", flush=True)
            return {"failed": f"the ranks ended with {ended.codes}", "seconds": ended.seconds}
        return json.loads(file.read_text()) | {"seconds": ended.seconds}


def verdict(ways: dict[str, dict[str, Any]]) -> str | None:
    """What differs between the two ways, or None."""
    one, other = ways.values()
    loss = abs(one["loss"] - other["loss"]) / abs(one["loss"])
    norm = max(abs(a - b) / b for a, b in zip(other["norms"], one["norms"], strict=True))
    if loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE:
        return None
    return f"losses differ by {loss:.1e}, gradient norms by {norm:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default="deepseek-v3,qwen1.5-moe-a2.7b", help=f"of {','.join(SHAPES)}")
    parser.add_argument("--transports", default="alltoall", help="of alltoall,buffer,elastic")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, of each way")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    for name in ("--worker", "--shape", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return rank_main(args)
    results: dict[str, Any] = {}
    wrong = []
    for transport in args.transports.split(","):
        for shape in args.shapes.split(","):
            key = f"{shape}, {transport}{', checkpointing' if args.checkpointing else ''}"
            results[key] = found = run_set(args, transport, shape)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
            if "failed" in found:
                wrong.append(f"{key}: {found['failed']}")
                continue
            print(f"{key} ({found['seconds']} s): {'; '.join(found['said'])}")
            for way, its in found["ways"].items():
                more = "".join(f", {name} {its[name]:.2f}" for name in ("peak_gib", "hidden") if name in its)
                spread = f"{min(its['ms']):.2f} to {max(its['ms']):.2f}"
                print(f"  {way:<9} {statistics.median(its['ms']):.2f} ms ({spread}){more}", flush=True)
            if (differs := verdict(found["ways"])) is not None:
                wrong.append(f"{key}: {differs}")
    print("\n".join(f"WRONG  {each}" for each in wrong) or "all the same")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
