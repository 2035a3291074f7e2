"""`kernels: te` on several ranks: training is that of `fused`, bit for bit.

A `transformer_engine` that checks every call (`fake_transformer_engine.py`) computes as torch does.
The real one: `tests/gpu/test_te.py`, and two ranks in `tests/gpu/results/te_two_ranks*.json`.
"""

import dataclasses
import functools

import pytest
from torch import distributed as dist

from moe_accel.kernels import te
from tests import fake_transformer_engine
from tests.dist import training
from tests.dist.parity import assert_identical
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.test_parity_training import NO_TOKENS
from tests.dist.training import SEQUENCE, Job

PARTS = {"experts": ["experts"], "permutation": ["permutation"], "both": ["experts", "permutation"]}
TWO_RANKS = (SEQUENCE,) * 2
JOBS = {
    "plain": (Job(lengths=TWO_RANKS), {}),
    "checkpointing": (Job(lengths=TWO_RANKS), {"gradient_checkpointing": "non-reentrant"}),
    "reentrant": (Job(lengths=TWO_RANKS), {"gradient_checkpointing": "reentrant"}),
    "a-rank-without-pairs": (Job(routing="one-expert-takes-all", lengths=TWO_RANKS), {}),
    "a-rank-without-tokens": (dataclasses.replace(NO_TOKENS, lengths=(SEQUENCE, 0)), {}),
}


def before_fork(job, **_):
    training.before_fork(job)


def trained(job, by_te, **how):
    calls = {}
    if by_te:
        patch = pytest.MonkeyPatch()
        fake_transformer_engine.install_as_on_a_gpu(patch)
        patch.setattr(te, "wrong_device", lambda *_: None)
        calls = fake_transformer_engine.CALLS
    result = training.on_ranks(job, mixed_precision="bf16", **how)
    dist.destroy_process_group()
    return result, dict(calls)


@functools.cache
def by_fused(name):
    job, how = JOBS[name]
    return run_ranks(trained, 2, with_moe_config(ep_size=2, kernels="fused"), job=job, by_te=False, **how)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_training_is_that_of_fused(name, parts):
    job, how = JOBS[name]
    launch = with_moe_config(ep_size=2, kernels="te", te_parts=parts)
    found = run_ranks(trained, 2, launch, job=job, by_te=True, **how)
    for (ours, calls), (theirs, none) in zip(found, by_fused(name), strict=True):
        assert not none
        assert (calls.get("NT", 0) > 0) is ("experts" in parts)
        assert (calls.get("permute", 0) > 0) is ("permutation" in parts)
        assert_identical(ours, theirs)
