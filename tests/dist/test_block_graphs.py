"""Blocks with experts that all ranks record and play together, with what stands for graphs (`pretended_graphs.py`).

Real ones: `python -m tests.gpu.several`, arm `graphs`.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import distributed as dist

from moe_accel import expert_load, track_expert_load
from moe_accel.graphs import CALLS, OTHER_CALLS, agreement, record
from tests import pretended_graphs
from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks, with_moe_config
from tests.families import build_tiny, tiny_inputs, tiny_loss

PLAIN, TRIED, PLAYED = "COMPUTE", "TRY", "PLAY"
BEGUN = [PLAIN] * CALLS + ["RECORD", TRIED]
"""Of the first steps: as ever, recorded, tried."""
GRAPHS = with_moe_config(ep_size=2, cuda_graphs=True) | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
WITHOUT = with_moe_config(ep_size=2) | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
ELSEWHERE = "Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of what a block, or another rank, says"
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "nemotron_h", "glm4_moe"]


@contextlib.contextmanager
def seen():
    """What all ranks decided in each forward, and what was warned of, in a block with graphs that are pretended."""
    patch, decided, said = pytest.MonkeyPatch(), [], []
    pretended_graphs.pretend(patch)
    decide = agreement.Agreement._decide

    def noted(self, ranks):
        decided.append(decide(self, ranks))
        return decided[-1]

    patch.setattr(agreement.Agreement, "_decide", noted)
    result = {"decided": [], "said": [], "attention": 0}
    play = record.Recording.play

    def counted(self, *given, **how):
        result["attention"] += self.number == 1
        return play(self, *given, **how)

    patch.setattr(record.Recording, "play", counted)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield result
    finally:
        patch.undo()
        said += [str(each.message) for each in caught]
        result["decided"] = [each.name for each in decided]
        result["said"] = [each for each in said if "CUDA graph" in each or "recorded" in each]


def prepared(family="qwen3_moe", **config):
    accelerator = Accelerator()
    model = build_tiny(family, **config)
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))


def step_of(model, optimizer, number, family="qwen3_moe", rows=2, length=9, masked=False):
    inputs = tiny_inputs(family, rows, length, 10 * number + dist.get_rank())
    if masked:
        inputs["attention_mask"] = (torch.arange(length) < length - 2).long().expand(rows, length).contiguous()
    loss = tiny_loss(model, inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def two(number, rank):
    return 2


def trained(family, steps, before=None, rows=two, masked=(), **config):
    """Losses of some steps, and what was seen."""
    with seen() as found:
        model, optimizer = prepared(family, **config)
        losses = []
        for number in range(steps):
            if before is not None:
                before(model, number)
            how = {"rows": rows(number, dist.get_rank()), "masked": number in masked}
            losses.append(step_of(model, optimizer, number, family, **how))
    dist.destroy_process_group()
    return {"losses": losses, **found}


def both(steps, **how):
    """What ranks trained with graphs and without, and that it is the same."""
    ours = run_ranks(trained, 2, GRAPHS, steps=steps, **how)
    theirs = run_ranks(trained, 2, WITHOUT, steps=steps, **how)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert not other["decided"]
    assert ours[0]["decided"] == ours[1]["decided"]
    return ours


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


def test_ranks_whose_tokens_are_never_as_many_compute_as_ever_for_good_and_are_told(monkeypatch):
    ours = both(OTHER_CALLS + 3, family="qwen3_moe", rows=never_even)
    assert ours[0]["decided"] == [PLAIN] * (OTHER_CALLS + 1)
    for each in ours:
        why = "other numbers of tokens on other ranks, 18 to 27 in one step"
        assert each["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of {why}"]


def late(number, rank):
    """Of three alike, the last is not."""
    return 3 if number == CALLS and rank == 1 else 2


def test_attention_that_was_recorded_before_its_blocks_is_recorded_anew_with_them():
    ours = both(12, family="qwen3_moe", rows=late)
    # Counted anew after the third; by then rank 0 had recorded some attention, and lets go of it: counted once more.
    assert ours[0]["decided"] == [PLAIN] * 2 * (CALLS + 1) + [*BEGUN, PLAYED, PLAYED]
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


def hook_on_one(model, number):
    if number == 0 and dist.get_rank() == 0:
        model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)


def test_what_one_rank_cannot_record_no_rank_records():
    ours = both(7, family="qwen3_moe", before=hook_on_one)
    assert ours[0]["decided"] == [PLAIN] * (CALLS + 1)
    name = "Qwen3MoeSparseMoeBlock is computed without a CUDA graph"
    assert f"{name}: hooks, or another forward, inside of it" in ours[0]["said"]
    assert ours[1]["said"] == [ELSEWHERE]


def call_twice(model, number):
    if number == 0:
        block = model.model.layers[1].mlp
        block.register_forward_hook(lambda module, args, output: module.forward(*args))


def test_a_block_that_is_called_twice_in_a_forward_trains_as_ever():
    both(9, family="qwen3_moe", before=call_twice)


def evaluate_first(model, number):
    if number == 6:
        model.model.layers[0].mlp.eval()


def test_the_others_go_on_where_the_first_is_not_trained_any_more():
    ours = both(12, family="qwen3_moe", before=evaluate_first)
    assert ours[0]["decided"][-1:] == [PLAYED]


def freeze_first_layer(model, number):
    for part in (model.model.embed_tokens, model.model.layers[0]) if number == 0 else ():
        part.requires_grad_(False)


def test_blocks_without_a_backward_are_left_out():
    ours = both(7, family="qwen3_moe", before=freeze_first_layer)
    assert ours[0]["decided"] == [*BEGUN, PLAYED, PLAYED, PLAYED]
    assert not any(each["said"] for each in ours)


@pytest.mark.parametrize("masked", [(1,), (2,), (3,), (1, 2), range(0, 16, 4)], ids=str)
def test_masks_are_for_attention_alone(masked):
    ours = both(16, family="qwen3_moe", masked=masked)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 12]
    assert not any(each["said"] for each in ours)


def large(model, number):
    if number == 0:
        agreement.MOST_TOKENS = 17


def test_more_tokens_than_pay_are_left_to_attention():
    ours = run_ranks(trained, 2, GRAPHS, family="qwen3_moe", steps=OTHER_CALLS + 2, before=large)
    for each in ours:
        assert each["decided"] == [PLAIN] * (OTHER_CALLS + 1)
        why = "18 tokens on each rank: some, and 17 at most"
        assert each["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of {why}"]
        assert each["attention"] == OTHER_CALLS + 2 - CALLS


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
        for number in range(OTHER_CALLS + 3):
            step_of(model, optimizer, number, length=4)
    dist.destroy_process_group()
    return found


def test_with_checkpointing_ranks_stop_to_ask_each_other():
    for each in run_ranks(recomputed, 2, GRAPHS):
        assert each["decided"] == [PLAIN] * (OTHER_CALLS + 1)
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
