"""Activation checkpointing with a router that decides otherwise when it is recomputed: forward's routing counts.

Two ranks, 8 experts, fp64. The router is a script of decisions, one a call; the routing weights do not depend on them.
So gradients are, bit for bit, those of the same forward without checkpointing.
"""

import functools
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from tests.dist.ranks import run_ranks
from tests.families import build_tiny, experts_modules, model_class

NUM_RANKS = 2
HIDDEN = 32

DECISION = [[0, 4], [1, 5], [2, 6], [3, 7], [0, 1], [5, 6]]
"""Experts of six tokens; rank 0 has experts 0 to 3."""

FLIPPED = {0: [[0, 1], *DECISION[1:]], 1: [*DECISION[:3], [6, 7], *DECISION[4:]]}
"""What each rank decides when it is asked again: one token fewer goes to the other rank."""

OTHER = [[7, 3], [6, 2], [5, 1], [4, 0], [6, 5], [2, 1]]
"""A second batch's decision: no choice in common with the first, as many rows."""


UPSTREAM = torch.randn(len(DECISION), HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def before_fork(**_):
    model_class("qwen3_moe")


class Setting:
    """Half of a layer's experts on each rank, and inputs."""

    def __init__(self, empty_rank=None):
        from moe_accel import experts
        from moe_accel.dispatch import AllToAll

        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.num_tokens = 0 if self.rank == empty_rank else len(DECISION)
        _, self.experts = next(experts_modules(build_tiny("qwen3_moe").double()))
        for name, stack in list(self.experts.named_parameters()):
            setattr(self.experts, name, torch.nn.Parameter(stack.detach().chunk(NUM_RANKS)[self.rank].clone()))
        experts.register()
        self.settings = experts.Settings("fused", AllToAll(dist.group.WORLD, 4), NUM_RANKS)
        experts.install(self.experts, self.settings)
        self.flipped = FLIPPED[self.rank]

    def inputs(self, seed):
        generator = torch.Generator().manual_seed(10 * seed + self.rank)
        x = torch.randn(self.num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
        weights = torch.rand(self.num_tokens, 2, generator=generator, dtype=torch.float64)
        return x.requires_grad_(), weights.requires_grad_()

    def loss(self, inputs, *decisions, how=None):
        """Linear in the block's output, so that what goes back does not depend on what came out."""
        return (self.output(inputs, *decisions, how=how) * UPSTREAM[: self.num_tokens]).sum()

    def output(self, inputs, *decisions, how=None):
        """Forward of one block; `decisions` are what its router says, call after call."""
        said = iter(decisions)

        def block(x, weights):
            decision = torch.tensor(next(said))[: self.num_tokens]
            return torch.tanh(x + self.experts(torch.sin(x), decision, weights))

        return block(*inputs) if how is None else checkpoint(block, *inputs, use_reentrant=how == "reentrant")

    def gradients(self, *inputs):
        """Those of all inputs and of this rank's experts, which are cleared."""
        tensors = [each for pair in inputs for each in pair] + list(self.experts.parameters())
        found = [each.grad for each in tensors]
        for each in tensors:
            each.grad = None
        return found

    def plain(self, seed, decision):
        """Gradients of the forward without checkpointing."""
        inputs = self.inputs(seed)
        self.loss(inputs, decision).backward()
        return self.gradients(inputs)

    def num_records(self, expected):
        """How many are alive, soon: gloo's threads let go of a tensor a moment after the collective that filled it."""
        deadline = time.monotonic() + 5
        while len(self.settings.records) != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(self.settings.records)


def equal(some, others):
    return [torch.equal(a, b) for a, b in zip(some, others, strict=True)]


def added(some, others):
    """Gradients of two backward passes: of each one's inputs, then the sum over both of the experts'."""
    return some[:2] + others[:2] + [a + b for a, b in zip(some[2:], others[2:], strict=True)]


# ---- scenarios, each run on a rank


def one_step(setting):
    inputs = setting.inputs(0)
    setting.loss(inputs, DECISION, setting.flipped, how="non-reentrant").backward()
    ours = setting.gradients(inputs)
    return {
        "forwards": equal(ours, setting.plain(0, DECISION)),
        "recomputes": equal(ours, setting.plain(0, setting.flipped)),
    }


def one_step_without_replay(setting):
    from moe_accel.experts.replay import Records

    with mock.patch.object(Records, "find", return_value=None):
        try:
            one_step(setting)
        except torch.utils.checkpoint.CheckpointError as error:
            return str(error).splitlines()[0]
    return "no error"


def reentrant(setting):
    inputs = setting.inputs(0)
    loss = setting.loss(inputs, DECISION, setting.flipped, how="reentrant")
    alive = setting.num_records(0)
    loss.backward()
    return {
        "recomputes": equal(setting.gradients(inputs), setting.plain(0, setting.flipped)),
        "records": [alive, setting.num_records(0)],
    }


def two_forwards(setting, order):
    truth = added(setting.plain(0, DECISION), setting.plain(1, OTHER))
    a, b = setting.inputs(0), setting.inputs(1)
    losses = [setting.loss(a, DECISION, setting.flipped, how="non-reentrant")]
    losses.append(setting.loss(b, OTHER, OTHER, how="non-reentrant"))
    alive = setting.num_records(2)
    if order == "sum":
        torch.stack(losses).sum().backward()
    else:
        for loss in losses if order == "first-first" else reversed(losses):
            loss.backward()
    return {"same": equal(setting.gradients(a, b), truth), "records": alive}


def old_loss(setting, backward):
    """A loss of an earlier batch is kept, whether its backward has passed or never comes."""
    old_inputs = setting.inputs(0)
    old = setting.loss(old_inputs, DECISION, DECISION, how="non-reentrant")
    if backward:
        old.backward()
        setting.gradients(old_inputs)
    inputs = setting.inputs(1)
    setting.loss(inputs, OTHER, OTHER, how="non-reentrant").backward()
    alive = setting.num_records(1)
    ours = setting.gradients(inputs)
    del old
    left = setting.num_records(0)
    return {"same": equal(ours, setting.plain(1, OTHER)), "records": [alive, left]}


def backward_twice(setting):
    truth = setting.plain(0, DECISION)
    inputs = setting.inputs(0)
    loss = setting.loss(inputs, DECISION, setting.flipped, setting.flipped, how="non-reentrant")
    loss.backward(retain_graph=True)
    loss.backward()
    return equal(setting.gradients(inputs), [2 * each for each in truth])


def records(setting):
    """How many are alive at each point."""
    found = {}
    loss = setting.loss(setting.inputs(0), DECISION, DECISION, how="non-reentrant")
    found["after forward"] = setting.num_records(1)
    loss.backward()
    del loss
    found["after backward"] = setting.num_records(0)
    loss = setting.loss(setting.inputs(0), DECISION)
    del loss
    found["after a loss without backward is dropped"] = setting.num_records(0)
    with torch.no_grad():
        kept = [setting.loss(setting.inputs(0), DECISION)]
    found["after forward without gradients"] = setting.num_records(0)
    with torch.inference_mode():
        kept.append(setting.loss(setting.inputs(0), DECISION))
    found["after inference"] = setting.num_records(0)
    return found


def beside_another_forward(setting, how):
    """A recompute that began its life beside a forward of other tokens, which is kept and was not checkpointed."""
    truth = setting.plain(1, OTHER)
    kept = setting.loss(setting.inputs(0), DECISION)
    inputs = setting.inputs(1)
    setting.loss(inputs, OTHER, OTHER, how=how).backward()
    del kept
    return equal(setting.gradients(inputs), truth)


def nested(setting):
    """A checkpoint around a checkpoint: the inner block goes forward three times."""
    inputs = setting.inputs(0)

    def inner(x, weights):
        return setting.output((x, weights), DECISION, setting.flipped, setting.flipped, how="non-reentrant")

    output = checkpoint(inner, *inputs, use_reentrant=False)
    (output * UPSTREAM).sum().backward()
    return equal(setting.gradients(inputs), setting.plain(0, DECISION))


def twice_in_a_region(setting):
    inputs = setting.inputs(0)

    def block(x, weights):
        return setting.output((setting.output((x, weights), DECISION), weights), DECISION)

    try:
        checkpoint(block, *inputs, use_reentrant=False).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def ahead_of_the_experts(setting, keep):
    """Backward enters the region by an output made before its experts; another forward's graph is kept or not."""
    kept = setting.loss(setting.inputs(0), DECISION, DECISION, how="non-reentrant")
    if not keep:
        del kept
    x, weights = setting.inputs(1)

    def block(x, weights):
        gate = torch.sin(x).exp()
        return torch.tanh(x + setting.experts(torch.sin(x), torch.tensor(OTHER), weights)), gate

    out, gate = checkpoint(block, x, weights, use_reentrant=False)
    try:
        gate.sum().backward(retain_graph=True)
    except RuntimeError as error:
        return str(error)
    x.grad = None
    (out * UPSTREAM).sum().backward()
    return equal(setting.gradients((x, weights)), setting.plain(1, OTHER))


def before_and_after(setting):
    """The check of this file's own truth: routing changes gradients, checkpointing without a flip does not."""
    inputs = setting.inputs(0)
    setting.loss(inputs, DECISION, DECISION, how="non-reentrant").backward()
    return {
        "without a flip": equal(setting.gradients(inputs), setting.plain(0, DECISION)),
        "with another routing": equal(setting.plain(0, DECISION), setting.plain(0, setting.flipped)),
    }


SCENARIOS = {
    "one_step": one_step,
    "one_step_without_replay": one_step_without_replay,
    "reentrant": reentrant,
    "sum": functools.partial(two_forwards, order="sum"),
    "first-first": functools.partial(two_forwards, order="first-first"),
    "last-first": functools.partial(two_forwards, order="last-first"),
    "old-loss-after-backward": functools.partial(old_loss, backward=True),
    "old-loss-before-backward": functools.partial(old_loss, backward=False),
    "backward_twice": backward_twice,
    "records": records,
    "beside-reentrant": functools.partial(beside_another_forward, how="reentrant"),
    "beside-non-reentrant": functools.partial(beside_another_forward, how="non-reentrant"),
    "nested": nested,
    "twice_in_a_region": twice_in_a_region,
    "ahead-alone": functools.partial(ahead_of_the_experts, keep=False),
    "ahead-beside-another": functools.partial(ahead_of_the_experts, keep=True),
    "before_and_after": before_and_after,
}


def play(name, empty_rank):
    return SCENARIOS[name](Setting(empty_rank))


def on_ranks(name, empty_rank=None):
    return run_ranks(play, NUM_RANKS, name=name, empty_rank=empty_rank)


SAME = [True] * 4
"""The gradients of the tokens, of their weights, and of this rank's two stacks of experts."""


def test_the_truth_of_this_file_knows_one_routing_from_another():
    for found in on_ranks("before_and_after"):
        assert found == {"without a flip": SAME, "with another routing": [False] * 4}


def test_a_flipped_decision_keeps_the_gradients_of_forwards_routing():
    for found in on_ranks("one_step"):
        assert found == {"forwards": SAME, "recomputes": [False] * 4}


def test_without_replay_the_same_step_is_a_checkpoint_error():
    for told in on_ranks("one_step_without_replay"):
        assert "Recomputed values for the following tensors have different metadata" in told


def test_a_reentrant_checkpoint_keeps_nothing_and_has_the_gradients_of_its_recompute():
    for found in on_ranks("reentrant"):
        assert found == {"recomputes": SAME, "records": [0, 0]}


@pytest.mark.parametrize("order", ["sum", "first-first", "last-first"])
def test_two_forwards_before_their_backwards_each_keep_their_own_routing(order):
    for found in on_ranks(order):
        assert found == {"same": [True] * 6, "records": 2}


@pytest.mark.parametrize("order", ["sum", "first-first", "last-first"])
def test_also_on_a_rank_without_tokens_where_no_decision_tells_one_forward_from_the_other(order):
    for found in on_ranks(order, empty_rank=1):
        assert found == {"same": [True] * 6, "records": 2}


def test_backward_may_enter_a_region_ahead_of_its_experts():
    for found in on_ranks("ahead-alone"):
        assert found == SAME


def test_but_not_beside_an_older_forward_whose_routing_would_be_taken_for_its_own():
    for told in on_ranks("ahead-beside-another"):
        assert "ahead of its experts while the graph of an older forward is alive" in told


@pytest.mark.parametrize("scenario", ["old-loss-after-backward", "old-loss-before-backward"])
def test_a_loss_that_is_kept_does_not_lend_its_routing_to_the_next_batch(scenario):
    for found in on_ranks(scenario):
        assert found == {"same": SAME, "records": [1, 0]}


def test_a_second_backward_through_the_same_graph_takes_the_same_routing():
    for found in on_ranks("backward_twice"):
        assert found == SAME


def test_a_record_lives_as_long_as_the_graph_and_none_without_gradients():
    for found in on_ranks("records"):
        assert found == {
            "after forward": 1,
            "after backward": 0,
            "after a loss without backward is dropped": 0,
            "after forward without gradients": 0,
            "after inference": 0,
        }


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_the_routing_of_another_forward_that_is_alive_is_not_taken(how):
    for found in on_ranks(f"beside-{how}"):
        assert found == SAME


def test_a_checkpoint_inside_a_checkpoint_keeps_forwards_routing():
    for found in on_ranks("nested"):
        assert found == SAME


def test_a_module_that_runs_twice_in_a_checkpointed_region_is_an_error_and_not_a_wrong_gradient():
    for told in on_ranks("twice_in_a_region"):
        assert told == "an experts module runs twice in one activation-checkpointed region"
