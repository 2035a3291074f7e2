"""What recorded blocks gain by what they compute while rows travel: one way after the other, in the same processes.

usage      python -m tests.gpu.overlap --gpus 4 [--layers 12] [--kind lora] [--routing balanced] [--out FILE]
no GPU     --device cpu: a tiny shape, over gloo, with what stands for graphs
prints     a line a way, in ms a step of the slowest rank; exit 1 where a way was not played, or its numbers differ
writes     the JSON
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu.processes import FSDP2, LOSS_TOLERANCE, NORM_TOLERANCE, check_gpus, python_path, run_ranks

LIMIT_S = 300
UNTIMED = 8
"""Steps: one that finds what is recorded old, three to be recorded, a trial, and some more."""
SIZES = {"cuda": ("qwen3-30b-a3b", 4096, 12, 10), "cpu": ("tiny", 32, 2, 3)}
"""Shape, sequence, layers and timed steps, by device."""


@dataclass(frozen=True)
class Way:
    """How a recorded block computes.

    Attributes:
        arrives: whether it goes on while rows come.
        beside: whether gradients of weights are computed beside the graph, rather than behind it.
        urgent: whether NCCL's kernels have priority.
        programs: of such gradients, for each multiprocessor; None: as usual.
    """

    arrives: bool = True
    beside: bool = True
    urgent: bool = True
    programs: int | None = None


WAYS = {
    "as it is": Way(),
    "nothing beside exchanges": Way(arrives=False, beside=False, urgent=False),
    "no priority": Way(urgent=False),
    "priority alone": Way(arrives=False, beside=False),
    "while rows come, alone": Way(beside=False),
    "gradients beside, alone": Way(arrives=False),
    "one program": Way(programs=1),
    "four programs": Way(programs=4),
    "as it is, again": Way(),
}


def main() -> None:
    args = arguments()
    if args.rank:
        be_rank(args)
        return
    check_gpus(args.gpus, args.device)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.gpu.overlap", "--rank", *sys.argv[1:]]
        environment = FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "PYTHONPATH": python_path()}
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        ended = run_ranks(command, args.gpus, environment, Path(folder), LIMIT_S)
    print(ended.outputs[0])
    if any(ended.codes):
        print(*(each[-3000:] for each in ended.outputs[1:]), sep="\n--\n")
    sys.exit(any(code != 0 for code in ended.codes))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kind", choices=["full", "lora"], default="full")
    parser.add_argument("--routing", choices=["random", "balanced"], default="random")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", action="store_true", help="be one of the ranks")
    return parser.parse_args()


def be_rank(args: argparse.Namespace) -> None:
    """Train in every way, with the same weights in all of them."""
    if args.device == "cpu":
        import pytest

        from tests import pretended_graphs

        pretended_graphs.pretend(pytest.MonkeyPatch())
    import torch.distributed as dist

    from moe_accel.bench import flops, routing
    from moe_accel.graphs.agreement import Decision
    from tests.gpu import several_main, several_rank
    from tests.gpu.several_cases import largest_difference

    shape, sequence, layers, timed = SIZES[args.device]
    sizes = {"batch": 1, "layers": args.layers or layers, "shape": shape, "sequence": sequence}
    of_steps = {"warmup": UNTIMED, "steps": timed, "device": args.device, "folder": "", "checkpoint": ""}
    job = several_rank.Job(kind=args.kind, arm="graphs", gpus=args.gpus, **sizes, **of_steps)
    device = several_rank.own_device(job)
    case, model = several_rank.build(job, device)
    vocabulary = model.config.vocab_size
    block, experts = next(routing.experts_children(model))
    top_k, num_experts = flops.top_k(block), flops.stack(experts).num_experts
    model, optimizer, _ = several_rank.spread(job, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    routing.install(model, args.routing, case.tokens, top_k, num_experts)
    tokens = several_rank.tokens_of(dist.get_rank(), job, vocabulary).to(device)

    def forward_backward() -> Any:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found: dict[str, Any] = {}
    switch, is_wrong = Switch(model), False
    for name, way in WAYS.items():
        switch.to(way)
        result = several_rank.steps(forward_backward, update, model, device, UNTIMED, timed)
        found[name] = result | {"way": asdict(way)}
        first = next(iter(found.values()))
        differ = [largest_difference(result[each], first[each]) or 0.0 for each in ("losses", "norms")]
        is_played = switch.agreement.decision is Decision.PLAY and switch.agreement.why_ended is None
        agrees = is_played and differ[0] <= LOSS_TOLERANCE and differ[1] <= NORM_TOLERANCE
        is_wrong |= not agrees
        if dist.get_rank() == 0:
            verdict = "" if agrees else "  WRONG" if is_played else "  NOT PLAYED"
            numbers = f"{result['ms']:8.2f} ms  loss {differ[0]:.1e}  norm {differ[1]:.1e}"
            print(f"{name:26} {numbers}{verdict}", flush=True)
    if dist.get_rank() == 0 and args.out is not None:
        given = [each for each in sys.argv[1:] if each != "--rank"]
        command = shlex.join(["python", "-m", "tests.gpu.overlap", *given])
        about = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        args.out.write_text(json.dumps(about | several_main.about(job) | {"ways": found}, indent=1) + "\n")
    dist.destroy_process_group()
    sys.exit(is_wrong)


class Switch:
    """Lets a model's blocks be recorded anew, to compute in another way."""

    def __init__(self, model: Any):
        from moe_accel.experts import find_experts, gathered, settings_of

        blocks = [vars(module).get("_moe_accel_graphs") for module in model.modules()]
        self.graphs: list[Any] = [each for each in blocks if hasattr(each, "agreement")]
        self.agreement = self.graphs[0].agreement
        self.settings: list[Any] = [settings_of(module) for _, module in find_experts(model)]
        self.recorder: Any = type(self.agreement.recorder)
        self.compute_beside, self.programs = self.recorder.compute_beside, gathered.PROGRAMS_BESIDE

    def to(self, way: Way) -> None:
        """From the next step on."""
        from moe_accel.dispatch import AllGather, Arrival
        from moe_accel.experts import function, gathered
        from moe_accel.ranks import urgent

        function.Arrival = Arrival if way.arrives else prompt(Arrival)
        self.recorder.compute_beside = self.compute_beside if way.beside else behind
        gathered.PROGRAMS_BESIDE = way.programs or self.programs
        for each in self.settings:
            group = each.dispatcher.group
            each.of_known_sizes = AllGather(urgent(group) if way.urgent else group, each.dispatcher.num_local_experts)
        self.agreement.recorder.renew_all()
        for each in self.graphs:
            each.recorded = 0  # they do not change all the time


def behind(_: Any, products: Sequence[Any]) -> list[Any]:
    """Instead of `Recorder.compute_beside`."""
    return [each.compute(*each.operands) for each in products]


def prompt(arrival: type) -> type:
    """An `Arrival` that nobody awaits."""

    class Prompt(arrival):
        is_awaited: Any = property(lambda _: False, lambda _, value: None)

    return Prompt


if __name__ == "__main__":
    main()
