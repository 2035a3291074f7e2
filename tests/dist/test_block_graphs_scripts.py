"""Scripts under which blocks with experts are not called in every forward alike: no rank waits for another for ever."""

import pytest
from torch import distributed as dist
from torch import nn

from moe_accel.graphs import CALLS, agreement, sizes
from tests.dist.block_graphs import (
    BEGUN,
    ELSEWHERE,
    GRAPHS,
    PLAIN,
    PLAYED,
    WITHOUT,
    both,
    prepared,
    seen,
    step_of,
    trained,
)
from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks
from tests.families import tiny_inputs, tiny_loss


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


def checkpoint_second(model, number):
    if number == 6:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.model.layers[0].gradient_checkpointing = False


def test_a_layer_that_is_checkpointed_later_is_computed_as_ever():
    ours = both(9, family="qwen3_moe", before=checkpoint_second)
    assert ours[0]["decided"] == [*BEGUN, *[PLAYED] * 5]


def look_at_all_modules_on_one(model, number):
    """In the first step, as profilers do; the first block has no backward."""
    freeze_first_layer(model, number)
    if number == 0 and dist.get_rank() == 0:
        look_at_all_modules_on_one.hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    if number == 1 and dist.get_rank() == 0:
        look_at_all_modules_on_one.hook.remove()


def test_global_hooks_on_one_rank_keep_blocks_from_being_recorded_then():
    ours = both(8, family="qwen3_moe", before=look_at_all_modules_on_one)
    assert ours[0]["decided"] == [PLAIN, *BEGUN, *[PLAYED] * 3]


def pairs():
    """Two forwards before each backward."""
    losses = []
    with seen() as found:
        model, optimizer = prepared()
        for number in range(8):
            both_of = [tiny_loss(model, tiny_inputs("qwen3_moe", 2, 9, 10 * number + each)) for each in (0, 1)]
            sum(both_of).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [each.item() for each in both_of]
    dist.destroy_process_group()
    return {"losses": losses, **found}


def test_of_two_forwards_before_a_backward_the_first_is_played():
    ours, theirs = (run_ranks(pairs, 2, launch) for launch in (GRAPHS, WITHOUT))
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["decided"] == [*BEGUN, *[PLAYED, PLAIN] * 6]
        assert not one["said"]


def large(model, number):
    if number == 0:
        sizes.MOST_ALIKE = agreement.MOST_TOKENS = 17


def test_more_tokens_than_pay_are_left_to_attention():
    ours = run_ranks(trained, 2, GRAPHS, family="qwen3_moe", steps=agreement.WAITING + 2, before=large)
    for each in ours:
        assert each["decided"] == [PLAIN] * (agreement.WAITING + 1)
        why = "18 tokens on each rank: some, and 17 at most"
        assert each["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of {why}"]
        assert each["attention"] == agreement.WAITING + 2 - CALLS


def soon(model, number):
    agreement.OTHER_CALLS, agreement.WAITING, agreement.MOST_TOKENS = 3, 4, 20


def uneven_from_six_on(number, rank):
    return 2 if number < 6 else 2 + rank


def test_what_is_recorded_and_never_called_alike_again_is_let_go_of_with_a_word():
    ours = both(17, family="qwen3_moe", before=soon, rows=uneven_from_six_on)
    assert ours[0]["decided"] == [*BEGUN, PLAYED, PLAYED, *[PLAIN] * 4, *[PLAIN] * 5]
    why = "18 to 27 tokens on each rank: some, and 20 at most"
    for each in ours:
        assert each["said"] == [f"Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of {why}"]


def destroyed():
    """Training, and the end of the process group: whether blocks had ended before, and have nothing left after."""
    with seen() as found:
        model, optimizer = prepared()
        for number in range(6):
            step_of(model, optimizer, number)
        graphs = [vars(each.mlp)["_moe_accel_graphs"] for each in model.model.layers]
        before = [(each.agreement.why_ended, each.recording is None) for each in graphs]
        dist.destroy_process_group()
    return {"before": before, "after": [(each.agreement.why_ended, each.recording is None) for each in graphs], **found}


def test_graphs_are_destroyed_before_the_process_group():
    for each in run_ranks(destroyed, 2, GRAPHS):
        assert each["decided"][-1] == PLAYED
        assert each["before"] == [(None, False)] * 2
        assert each["after"] == [("", True)] * 2
