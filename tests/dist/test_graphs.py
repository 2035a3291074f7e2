"""`cuda_graphs` on several ranks: training is what it is without, however FSDP2 gathers.

To the bit with `ep_size: 1`; in expert parallelism recorded blocks compute the same sums in tensors of other sizes.

With what stands for graphs (`pretended_graphs.py`); real ones: `tests/gpu/test_graphs.py`, and `several.py`.
"""

import functools

import pytest
from torch import distributed as dist

from moe_accel import graphs
from tests import pretended_graphs
from tests.dist import training
from tests.dist.parity import UPDATE_TOLERANCE, assert_identical, assert_same_weights
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import SEQUENCE, Job

TWO_RANKS = (SEQUENCE,) * 2
LORA = (("r", 4), ("target_modules", ["q_proj", "v_proj", "o_proj"]))
JOBS = {
    "plain": (Job(lengths=TWO_RANKS, num_steps=6), {}, {}),
    "unwrapped": (Job(lengths=TWO_RANKS, num_steps=6), {}, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}),
    "gathered": (Job(lengths=TWO_RANKS, num_steps=6), {}, {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
    "mixed": (Job(lengths=TWO_RANKS, num_steps=6), {"mixed_precision": "bf16"}, {}),
    "accumulating": (Job(lengths=TWO_RANKS, num_steps=4, accumulate=2), {}, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}),
    "adapters": (Job(lengths=TWO_RANKS, num_steps=6, lora=LORA), {}, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}),
    "checkpointing": (Job(lengths=TWO_RANKS, num_steps=5), {"gradient_checkpointing": "non-reentrant"}, {}),
}


ROUNDING = {"mixed": 2**-8}
"""Of a loss, where products are in bf16."""


def before_fork(job, **_):
    training.before_fork(job)


def trained(job, recorded, **how):
    played = []
    patch = pytest.MonkeyPatch()
    if recorded:
        pretended_graphs.pretend(patch)
        forward = graphs.Recording.forward

        def counted(self, tensors, token, call):
            played.append((self.number, call is not None))
            return forward(self, tensors, token, call)

        patch.setattr(graphs.Recording, "forward", counted)
    result = training.on_ranks(job, **how)
    dist.destroy_process_group()
    return result, played


@functools.cache
def without(name, ep_size):
    job, how, variables = JOBS[name]
    launch = with_moe_config(ep_size=ep_size) | variables
    return run_ranks(trained, 2, launch, job=job, recorded=False, **how)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_training_is_what_it_is_without(name, ep_size):
    job, how, variables = JOBS[name]
    launch = with_moe_config(ep_size=ep_size, cuda_graphs=True) | variables
    found = run_ranks(trained, 2, launch, job=job, recorded=True, **how)
    forwards = job.num_steps * job.accumulate - graphs.CALLS
    for (ours, played), (theirs, none) in zip(found, without(name, ep_size), strict=True):
        assert not none
        if name == "checkpointing":
            assert not played
        elif ep_size == 1:
            # The first and the second are a trial, but for what was recorded last in the second.
            trial, later = [(1, True), (2, True), (1, True), (2, False)], [(1, False), (2, False)]
            assert played == trial + later * (forwards - 2)
        else:
            tried = [
                (1, True),
                (1, True),
                (2, False),
                (2, True),
            ]  # attention and blocks by turns, each with own numbers
            assert played == [
                (1, True),
                (2, True),
                *tried,
                *[(1, False), (1, False), (2, False), (2, False)] * (forwards - 2),
            ]
        if ep_size == 1 or name == "checkpointing":
            assert_identical(ours, theirs)
        else:
            off_by = ROUNDING.get(name, UPDATE_TOLERANCE)
            assert ours.losses == pytest.approx(theirs.losses, rel=off_by)
            assert ours.norms == pytest.approx(theirs.norms, rel=off_by)
            if name not in ROUNDING:
                assert_same_weights(ours, theirs, job)
