"""Blocks with experts that are recorded for a capacity, as ragged batches have other numbers of tokens in every step.

With what stands for graphs (`pretended_graphs.py`); real ones: `python -m tests.gpu.several`, kind `ragged`.
"""

import pytest
import torch
from torch import distributed as dist

from moe_accel import expert_load, track_expert_load
from moe_accel.graphs import CALLS, sizes
from tests.dist.block_graphs import BEGUN as ALIKE
from tests.dist.block_graphs import (
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
from tests.families import tiny_inputs, tiny_loss

NOTED = [PLAIN] * (sizes.RAGGED + 1)
"""Of the first steps: as ever, until so many were alike but for their tokens."""
BEGUN = [*NOTED, "RECORD", TRIED]
LENGTH = 9
LEFT_OUT = (GRAPHS, {"cuda_graphs": True}), (WITHOUT, {})


def ragged(number, rank):
    """Rows of a batch."""
    return 1 + (number + rank) % 3


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_what_it_is_without(family):
    ours = both(len(BEGUN) + 3, family=family, rows=ragged)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 3]
    assert not any("Block" in said or "MoE" in said for each in ours for said in each["said"])  # but attention


def without_padding(steps):
    """Losses of batches whose padding is left out, [2,T] as one row, and the expert load of the last step."""
    with seen() as found:
        model, optimizer = prepared()
        track_expert_load(model)
        losses, loads, tokens = [], [], []
        for number in range(steps):
            inputs = tiny_inputs("qwen3_moe", 2, LENGTH, 10 * number + dist.get_rank())
            lengths = torch.tensor([[1 + (number + dist.get_rank()) % LENGTH], [LENGTH - number % 3]])
            mask = torch.arange(LENGTH) < lengths
            inputs |= {"attention_mask": mask.long(), "labels": inputs["input_ids"].masked_fill(~mask, -100)}
            loss = tiny_loss(model, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            loads.append([sum(layer["tokens"]) for layer in expert_load(model).values()])
            everywhere = torch.tensor(int(mask.sum()))
            dist.all_reduce(everywhere)
            tokens.append(int(everywhere))
    dist.destroy_process_group()
    return {"losses": losses, "loads": loads, "tokens": tokens, **found}


def test_batches_without_their_padding_are_played_and_every_token_is_counted_once():
    steps = len(BEGUN) + 5
    launches = (launch | with_moe_config(ep_size=2, padding_free="auto", **more) for launch, more in LEFT_OUT)
    ours, theirs = (run_ranks(without_padding, 2, launch, steps=steps) for launch in launches)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["decided"] == [*BEGUN, *[PLAYED] * 5]
        assert one["loads"] == other["loads"] == [[2 * size] * 2 for size in one["tokens"]]
        assert len(set(one["tokens"])) > 3


MANY = 16
"""Rows, of more tokens than there is room for."""


def sometimes_many(number, rank):
    return MANY if number in (16, 18) and rank == 1 else ragged(number, rank)


def test_more_tokens_than_there_is_room_for_are_computed_as_ever():
    ours = both(21, family="qwen3_moe", rows=sometimes_many)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 3, PLAIN, PLAYED, PLAIN, PLAYED, PLAYED]


def often_many(number, rank):
    return MANY if number >= 16 and rank == number % 2 else ragged(number, rank)


def soon(model, number):
    sizes.TOO_MANY = 2


def test_room_is_made_for_more_tokens_where_too_often_there_are():
    steps = 16 + 3 + sizes.AGAIN + 4
    ours = both(steps, family="qwen3_moe", rows=often_many, before=soon)
    again = [PLAIN] * (3 + sizes.AGAIN) + ["RECORD", TRIED, PLAYED, PLAYED]
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 3, *again]


def alike_at_first(number, rank):
    return 2 if number < CALLS + 4 else ragged(number, rank)


def test_blocks_that_were_recorded_for_one_size_are_recorded_for_all():
    steps = CALLS + 4 + 3 + sizes.RAGGED + 4
    ours = both(steps, family="qwen3_moe", rows=alike_at_first, before=soon)
    decided = ours[0]["decided"]
    assert decided[: CALLS + 4] == [PLAIN] * CALLS + ["RECORD", TRIED, PLAYED, PLAYED]
    played = [at for at, each in enumerate(decided) if each == "RECORD"]
    assert len(played) == 2
    assert decided[played[1] :][:3] == ["RECORD", TRIED, PLAYED]


def spoiled(number_of_step):
    """Weights after steps of which one, played, had no finite number in its tokens."""
    with seen() as found:
        model, optimizer = prepared()
        for number in range(number_of_step + 4):
            if number == number_of_step:
                inputs = tiny_inputs("qwen3_moe", 3, LENGTH, number)
                hook = model.model.embed_tokens.register_forward_hook(lambda *given: given[-1] * torch.nan)
                tiny_loss(model, inputs).backward()
                hook.remove()
                optimizer.zero_grad()  # as a gradient scaler leaves it out
            else:
                step_of(model, optimizer, number, rows=1 + number % 2)
        finite = all(bool(each.isfinite().all()) for each in model.parameters())
    dist.destroy_process_group()
    return {"finite": finite, **found}


def test_tokens_of_a_step_that_was_left_out_are_not_behind_those_of_the_next():
    for each in run_ranks(spoiled, 2, GRAPHS, number_of_step=len(BEGUN) + 1):
        assert each["finite"]
        assert each["decided"] == [*BEGUN, *[PLAYED] * 5]


AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe"])
def test_router_logits_are_handed_on_with_their_gradients(family):
    ours = both(7, family=family, **AUX)
    assert ours[0]["decided"] == [*ALIKE, *[PLAYED] * 3]
    assert ours[0]["losses"] != pytest.approx(run_ranks(trained, 2, GRAPHS, family=family, steps=7)[0]["losses"])
    ours = both(len(BEGUN) + 3, family=family, rows=ragged, **AUX)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 3]


def asked_for_now_and_then():
    """Losses of steps in some of which router logits are asked for, and how many layers' there were in each."""
    with seen() as found:
        model, optimizer = prepared(router_aux_loss_coef=0.5)
        losses, layers = [], []
        for number in range(16):
            inputs = tiny_inputs("qwen3_moe", 2, LENGTH, 10 * number + dist.get_rank())
            outputs = model(**inputs, output_router_logits=number not in (6, 8))
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
            layers.append([tuple(each.shape) for each in outputs.router_logits or ()])
    dist.destroy_process_group()
    return {"losses": losses, "layers": layers, **found}


def test_forwards_that_router_logits_are_not_asked_of_are_computed_as_ever():
    ours, theirs = (run_ranks(asked_for_now_and_then, 2, launch) for launch in (GRAPHS, WITHOUT))
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["layers"] == other["layers"]
        assert one["layers"][5] == [(18, 8)] * 2
        assert one["decided"] == [*ALIKE, PLAYED, PLAYED, PLAIN, PLAYED, PLAIN, *[PLAYED] * 7]
