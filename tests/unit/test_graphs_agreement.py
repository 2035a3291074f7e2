"""What ranks agree on about blocks that they record together, by what one of them tells."""

import torch

from moe_accel.graphs.agreement import Agreement, Decision
from moe_accel.graphs.calls import given
from tests.pretended_graphs import Pretended


class Block:
    """As an agreement knows one."""

    recording = None

    def __init__(self):
        self.why_not = ""

    def has_ended(self, about_to_record):
        return bool(self.why_not)


def alone(blocks):
    """An agreement of one rank."""
    agreement = Agreement(Pretended())
    agreement._of_all_ranks = lambda state: [state]
    for each in blocks:
        agreement.add(each)
    return agreement


def decided(agreement, calls):
    agreement.begin()
    return [agreement.decide(block, given("cpu", (torch.zeros(1, tokens, 4),), {})) for block, tokens in calls]


def test_the_third_of_forwards_that_are_alike_is_recorded():
    blocks = Block(), Block()
    agreement = alone(blocks)
    found = [decided(agreement, [(each, 5) for each in blocks]) for _ in range(3)]
    assert found == [[Decision.COMPUTE] * 2] * 2 + [[Decision.RECORD] * 2]


def test_blocks_that_get_another_number_of_tokens_than_the_first_are_not_recorded():
    first, second = Block(), Block()
    agreement = alone([first, second])
    for _ in range(3):
        assert set(decided(agreement, [(first, 5), (second, 3)])) == {Decision.COMPUTE}
    assert agreement.why_ended == ""
    assert not first.why_not
    assert second.why_not.startswith("called with another number of tokens")


def test_a_block_that_is_called_twice_in_a_forward_is_not_recorded():
    blocks = Block(), Block()
    agreement = alone(blocks)
    for _ in range(3):
        assert set(decided(agreement, [(blocks[0], 5), (blocks[1], 5), (blocks[1], 5)])) == {Decision.COMPUTE}
    assert agreement.why_ended == ""
    assert blocks[1].why_not == "called more than once in a forward"


def test_without_the_models_hook_a_forward_begins_with_the_first_block():
    blocks = Block(), Block()
    agreement = alone(blocks)
    calls = [agreement.decide(each, given("cpu", (torch.zeros(1, 5, 4),), {})) for _ in range(3) for each in blocks]
    assert calls == [Decision.COMPUTE] * 4 + [Decision.RECORD] * 2
