"""Attention that is recorded for a capacity, as batches have other numbers of tokens, or sequences, in every step.

With what stands for a graph (`pretended_graphs.py`); on a GPU: `tests/gpu/test_graphs.py`.
"""

import copy

import pytest
import torch

from moe_accel import graphs, padding
from moe_accel.graphs import module
from tests import graphs as cases
from tests.families import build_tiny
from tests.graphs import UNTIL, assert_same, ragged, told, trained, turns
from tests.pretended_graphs import Pretended


def pair(family="qwen3_moe"):
    model = build_tiny(family)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert padding.install(each).value == "left out"
        graphs.leave_cache_out(each)
    assert graphs.record_attention(model, Pretended())
    return model, twin


@pytest.mark.parametrize("family", cases.RAGGED_FAMILIES)
def test_ragged_batches_train_as_without(family):
    cases.trains_with_other_sizes(pair, ragged, family)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_packed_rows_train_as_without(family):
    cases.trains_with_other_sizes(pair, cases.packed, family)


def test_packed_rows_of_other_lengths_train_as_without():
    cases.trains_with_other_sizes(pair, lambda *given: cases.packed(*given, length=70 + given[1] % 9), "qwen3_moe")


@pytest.mark.parametrize("case", cases.OTHER_SIZES, ids=lambda case: case.__name__)
def test_that(case):
    case(pair)


def test_rows_of_one_length_after_ragged_ones_fit_too():
    model, twin = pair()
    for step in range(UNTIL + 2):
        trained(model, ragged(model, step))
    whole = ragged(model, 70)
    whole["attention_mask"][:] = 1
    whole["attention_mask"][0, 20:] = whole["attention_mask"][1, 20:] = 0
    whole["labels"] = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    assert_same(trained(model, whole), trained(twin, whole))
    assert set(turns(model)) == {3}


def test_what_was_recorded_for_one_size_is_recorded_for_all(monkeypatch):
    monkeypatch.setattr("moe_accel.graphs.sizes.TOO_MANY", 8)
    model, twin = pair()
    for step in range(4):
        trained(model, cases.batch(model, step))
    assert set(turns(model)) == {2}
    # of other calls the first is unlike those before, nine are too many, and of the next ones the third is recorded
    for step in range(4, 4 + UNTIL + 6):
        assert_same(trained(model, ragged(model, step)), trained(twin, ragged(model, step)))
    assert set(turns(model)) == {5}


def test_a_row_of_other_lengths_without_a_mask_is_played_and_several_are_not():
    model, twin = pair()
    for step in range(UNTIL + 3):
        given = {name: each[:1] for name, each in cases.batch(model, step, length=20 + step % 7).items()}
        assert_same(trained(model, given), trained(twin, given))
    assert set(turns(model)) == {3}
    model, twin = pair()
    with told() as said:
        for step in range(UNTIL + 3):
            given = cases.batch(model, step, length=20 + step % 7)
            assert_same(trained(model, given), trained(twin, given))
    assert set(turns(model)) == {0}
    assert [each for each in said if "calls of which no three are alike" in each]


def test_numbers_that_are_not_finite_in_one_step_are_not_in_the_next():
    model, twin = pair()
    for step in range(UNTIL + 2):
        trained(model, ragged(model, step))
    long, short = ragged(model, 3), ragged(model, 4)
    long["attention_mask"][:] = 1
    long["attention_mask"][0, -1] = 0
    long["labels"] = long["input_ids"].masked_fill(long["attention_mask"] == 0, -100)
    hook = model.model.embed_tokens.register_forward_hook(lambda *given: given[-1] * torch.nan)
    trained(model, long)
    hook.remove()
    found = trained(model, short)
    assert set(turns(model)) == {4}
    assert_same(found, trained(twin, short))


def test_what_there_may_be_no_room_for_is_not_recorded(monkeypatch):
    for name in ("module", "sizes"):
        monkeypatch.setattr(f"moe_accel.graphs.{name}.MOST_TOKENS", 100)
    model, twin = pair()
    for step in range(UNTIL + 4):
        is_long = step == UNTIL + 1
        given = ragged(model, step, length=400 if is_long else 48)
        assert (int(given["attention_mask"].sum()) > 100) == is_long
        with monkeypatch.context() as patch:
            if step == UNTIL:  # put off, once enough was seen
                patch.setattr(Pretended, "may_record", False)
            assert_same(trained(model, given), trained(twin, given))
    assert set(turns(model)) == {2}


def played(model):
    """How often each layer was, at least."""
    return min(each or 0 for each in turns(model))


def with_positions(model, seed, rows, length):
    inputs = {name: each[:1].expand(rows, -1) for name, each in cases.batch(model, seed, length=length).items()}
    return inputs | {"position_ids": torch.arange(length).expand(rows, -1), "use_cache": False}


def test_several_rows_are_not_played_as_one():
    model, twin = pair()
    for step in range(UNTIL + 2):
        trained(model, with_positions(model, step, 1, 20 + step % 7))
    assert set(turns(model)) == {2}
    several = with_positions(model, 50, 2, 12)
    assert_same(trained(model, several), trained(twin, several))
    assert set(turns(model)) == {2}


def full(model, seed):
    """A batch of several rows without padding."""
    return cases.batch(model, seed)


@pytest.mark.parametrize("full_ones", [2, 8])
def test_full_batches_among_ragged_ones_do_not_undo_what_they_are_recorded_for(full_ones):
    model, twin = pair()
    most = 10 - full_ones if full_ones < 5 else full_ones
    for step in range(100):
        given = full(model, step) if step % 10 < full_ones else ragged(model, step)
        assert_same(trained(model, given), trained(twin, given))
    assert played(model) > 0.7 * 10 * most


def test_a_shorter_row_among_longer_ones_of_one_length_leaves_them_recorded(monkeypatch):
    for name in ("module", "sizes"):
        monkeypatch.setattr(f"moe_accel.graphs.{name}.MOST_TOKENS", 64)
    model, twin = pair()
    for step in range(2 * UNTIL + 6):
        given = cases.packed(model, step, length=50 if step == 5 else 96)
        assert_same(trained(model, given), trained(twin, given))
    assert played(model) > 4


def test_a_shorter_row_than_there_always_were_is_computed_as_ever():
    model, twin = pair()
    for step in range(UNTIL + 3):
        given = cases.packed(model, step)
        assert_same(trained(model, given), trained(twin, given))
    assert set(turns(model)) == {3}
    shorter = cases.packed(model, 40, length=90)
    assert_same(trained(model, shorter), trained(twin, shorter))
    assert set(turns(model)) == {3}


def test_too_many_tokens_do_not_undo_what_is_recorded(monkeypatch):
    for name in ("module", "sizes"):
        monkeypatch.setattr(f"moe_accel.graphs.{name}.MOST_TOKENS", 64)
    model, _ = pair()
    for step in range(120):
        trained(model, ragged(model, step // 2))
    before = played(model)
    for step in range(120, 160):
        trained(model, ragged(model, step // 2))
    assert before > 20
    assert played(model) > before


def test_layers_that_are_frozen_are_not_looked_at_in_every_step(monkeypatch):
    model, _ = pair()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    looked = []
    watched = module.Watched
    monkeypatch.setattr(module, "Watched", lambda each: looked.append(each) or watched(each))
    for step in range(5 * UNTIL):
        trained(model, ragged(model, step))
    assert 0 < len(looked) <= 2 * 5
