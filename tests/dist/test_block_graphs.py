"""Blocks with experts that all ranks record and play together, with what stands for graphs (`pretended_graphs.py`).

Real ones: `python -m tests.gpu.several`, arm `graphs`.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import distributed as dist

from moe_accel import expert_load, track_expert_load
from moe_accel.graphs import CALLS, agreement, record
from tests.dist.block_graphs import (
    BEGUN,
    ELSEWHERE,
    FAMILIES,
    GRAPHS,
    PLAIN,
    PLAYED,
    TRIED,
    WITHOUT,
    both,
    prepared,
    seen,
    step_of,
    trained,
)
from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks, with_moe_config
from tests.families import build_tiny, tiny_inputs, tiny_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_what_it_is_without(family):
    ours = both(7, family=family)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 3]
    assert not any(each["said"] for each in ours)


def test_four_ranks_agree():
    launch = with_moe_config(ep_size=4, cuda_graphs=True)
    ours = run_ranks(trained, 4, launch, family="qwen3_moe", steps=6)
    theirs = run_ranks(trained, 4, with_moe_config(ep_size=4), family="qwen3_moe", steps=6)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["decided"] == [*BEGUN, PLAYED, PLAYED]


def uneven(number, rank):
    return 3 if number == 5 and rank == 1 else 2


def test_a_step_with_other_tokens_on_one_rank_is_computed_as_ever_on_all():
    ours = both(9, family="qwen3_moe", rows=uneven)
    assert ours[0]["decided"] == [*BEGUN, PLAYED, PLAIN, *[PLAYED] * 3]


def never_even(number, rank):
    return 2 + rank


def few(model, number):
    agreement.MOST_TOKENS = 20


def test_ranks_that_always_have_too_many_tokens_compute_as_ever_for_good_and_are_told():
    ours = both(agreement.WAITING + 3, family="qwen3_moe", rows=never_even, before=few)
    assert ours[0]["decided"] == [PLAIN] * (agreement.WAITING + 1)
    for each in ours:
        why = "18 to 27 tokens on each rank: some, and 20 at most"
        assert each["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of {why}"]


def late(number, rank):
    """Of three alike, the last is not."""
    return 3 if number == CALLS and rank == 1 else 2


def test_an_uneven_step_among_the_first_delays_blocks_alone():
    ours = both(12, family="qwen3_moe", rows=late)
    assert ours[0]["decided"] == [PLAIN] * (CALLS + 1) + [*BEGUN, *[PLAYED] * 5]
    assert ours[0]["attention"] == 12 - CALLS
    assert not any(each["said"] for each in ours)


def freeze(model, number):
    if number == 6:
        model.model.layers[1].mlp.gate.weight.requires_grad_(False)


def test_a_change_is_seen_and_all_are_recorded_anew():
    ours = both(12, family="qwen3_moe", before=freeze)
    decided = ours[0]["decided"]
    assert decided[:6] == [*BEGUN, PLAYED, PLAYED]
    assert decided[6:] == [PLAIN] * (CALLS + 1) + ["RECORD", TRIED, PLAYED]


def change_on_one(model, number):
    if number == 6 and dist.get_rank() == 1:
        model.model.layers[1].mlp.gate.eval()


def test_a_change_on_one_rank_is_seen_by_all():
    ours = both(12, family="qwen3_moe", before=change_on_one)
    assert ours[0]["decided"][6:] == [PLAIN] * (CALLS + 1) + ["RECORD", TRIED, PLAYED]


def wrong_on_one():
    """Training in which one rank's second block plays something else."""
    patch = pytest.MonkeyPatch()
    compare = record.Trial.compare_outputs

    def compared(self, found, own):
        if dist.get_rank() == 1 and not self._exactly:
            found = [each + 1 for each in found]
        compare(self, found, own)

    patch.setattr(record.Trial, "compare_outputs", compared)
    try:
        return trained("qwen3_moe", 7)
    finally:
        patch.undo()


def test_a_fault_that_one_rank_finds_ends_it_on_all():
    ours = run_ranks(wrong_on_one, 2, GRAPHS)
    theirs = run_ranks(trained, 2, WITHOUT, family="qwen3_moe", steps=7)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["decided"] == [*BEGUN, PLAIN]
    assert ours[0]["said"] == [ELSEWHERE]
    wrong = "what was recorded is not what the module computes"
    assert ours[1]["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph: {wrong}"] * 2


def counted():
    """Expert load of seven steps, step by step."""
    with seen() as found:
        model, optimizer = prepared()
        track_expert_load(model)
        loads = []
        for number in range(7):
            step_of(model, optimizer, number)
            loads.append([layer["tokens"] for layer in expert_load(model).values()])
    dist.destroy_process_group()
    return {"loads": loads, **found}


def test_expert_load_counts_every_token_once_also_what_is_played():
    ours, theirs = (run_ranks(counted, 2, launch)[0] for launch in (GRAPHS, WITHOUT))
    assert ours["decided"] == [*BEGUN, *[PLAYED] * 3]
    assert ours["loads"][:5] == theirs["loads"][:5]
    assert all(sum(layer) == 2 * 2 * 9 * 2 for step in ours["loads"] for layer in step)


def together():
    """Two forwards before their losses go backward, evaluation between steps, and a copy of the model."""
    with seen() as found:
        model, optimizer = prepared()
        for number in range(6):
            step_of(model, optimizer, number)
        losses = [tiny_loss(model, tiny_inputs("qwen3_moe", 2, 9, seed)) for seed in (50, 51)]
        sum(losses).backward()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(tiny_loss(model, tiny_inputs("qwen3_moe", 2, 9, 52)))
        model.train()
        losses += [torch.tensor(step_of(model, optimizer, number)) for number in range(6, 8)]
    dist.destroy_process_group()
    return {"losses": [each.item() for each in losses], **found}


def test_forwards_before_a_backward_and_evaluation_are_computed_as_ever():
    ours, theirs = (run_ranks(together, 2, launch) for launch in (GRAPHS, WITHOUT))
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["decided"] == [*BEGUN, PLAYED, PLAYED, PLAYED, PLAIN, PLAYED, PLAYED]


def recomputed():
    """Training with checkpointing all along: calls that cannot be recorded."""
    with seen() as found:
        model = build_tiny("qwen3_moe")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model, optimizer = Accelerator().prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
        for number in range(agreement.WAITING + 3):
            step_of(model, optimizer, number, length=4)
    dist.destroy_process_group()
    return found


def test_with_checkpointing_ranks_stop_to_ask_each_other():
    for each in run_ranks(recomputed, 2, GRAPHS):
        assert each["decided"] == [PLAIN] * (agreement.WAITING + 1)
        (said,) = {message.partition(", because of ")[2] for message in each["said"]}
        assert said == "checkpointing, or other hooks on what is saved for backward"


def copied():
    """A copy of a prepared model has what is needed to agree, of its own."""
    with seen():
        model = build_tiny("qwen3_moe")
        accelerator = Accelerator()
        from moe_accel.plugin import swap_all

        swap_all(accelerator, [model])
        twin = copy.deepcopy(model)
        graphs = [vars(each.mlp)["_moe_accel_graphs"] for each in (*model.model.layers, *twin.model.layers)]
    dist.destroy_process_group()
    agreements = [each.agreement for each in graphs]
    return [agreements[0] is agreements[1], agreements[2] is agreements[3], agreements[0] is agreements[2]], [
        each.recorder is each.agreement.recorder for each in graphs
    ]


def test_a_copied_model_agrees_for_itself():
    for shared, own in run_ranks(copied, 2, GRAPHS):
        assert shared == [True, True, False]
        assert all(own)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kernels": "reference"}, "no CUDA graphs of blocks with experts: experts are computed by reference"),
        ({"cuda_graphs": "attention"}, None),
        ({"ep_size": 2, "dp_replicate_size": 2}, "FSDP2 gathers experts, of which other groups of ranks have parts"),
    ],
    ids=["reference", "attention", "replicas"],
)
def test_where_blocks_are_not_recorded_the_report_says_why(options, why):
    launch = with_moe_config(**({"ep_size": 2, "cuda_graphs": True} | options))
    num_ranks = 2 * options.get("dp_replicate_size", 1)
    notes = run_ranks(reported, num_ranks, launch)[0]
    assert any("attention of 2 layers as CUDA graphs" in each for each in notes)
    of_blocks = [each for each in notes if "blocks" in each]
    assert len(of_blocks) == (why is not None)
    assert why is None or why in of_blocks[0]


def reported():
    from moe_accel.plugin import reports

    with seen():
        accelerator = Accelerator()
        model = build_tiny("qwen3_moe")
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
        (report,) = reports(accelerator)
    dist.destroy_process_group()
    return list(report.notes)
