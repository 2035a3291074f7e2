"""Same loss, gradients, clipped norm and weights after three steps as one process with stock transformers, by family.

Four ranks: ep 1 is plain FSDP2 around our experts function, ep 2 leaves efsdp 2, ep 4 leaves none.
"""

import dataclasses

import pytest

from tests.dist.parity import assert_same_training, train_on_ranks
from tests.dist.training import Job, initial_model, reference

EP_SIZES = {
    "qwen3_moe": (1, 2, 4),
    "mixtral": (2,),
    "deepseek_v3": (4,),
    "glm4_moe": (),
    "gpt_oss": (2,),
    "nemotron_h": (4,),
    "qwen3_next": (2,),
    "qwen3_5_moe": (),
    "olmoe": (),
    "granitemoe": (),
}
"""The ep sizes of the default run; the others are `slow`."""

CASES = [
    pytest.param(family, ep_size, id=f"{family}-ep{ep_size}", marks=() if ep_size in quick else pytest.mark.slow)
    for family, quick in EP_SIZES.items()
    for ep_size in (1, 2, 4)
]


@pytest.mark.parametrize(("family", "ep_size"), CASES)
def test_training_is_that_of_one_process(family, ep_size):
    job = Job(family)
    assert_same_training(train_on_ranks(job, ep_size), reference(job), job)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_stock_fsdp2_passes_the_same_comparison(family):
    """So a failure above is moe-accel's, and not that of accelerate or of the comparison."""
    job = Job(family)
    assert_same_training(train_on_ranks(job, None), reference(job), job)


@pytest.mark.parametrize("part", ["losses", "norms", "gradients", "weights"])
def test_the_comparison_sees_an_error_of_a_thousandth(part):
    job = Job()
    truth = reference(job)
    values = getattr(truth, part)
    if part in ("losses", "norms"):
        changed = [1.001 * values[0], *values[1:]]
    else:
        name = "model.layers.1.mlp.experts.down_proj"
        start = initial_model(job).state_dict()[name] if part == "weights" else 0.0
        changed = {**values, name: start + 1.001 * (values[name] - start)}
    with pytest.raises(AssertionError):
        assert_same_training(dataclasses.replace(truth, **{part: changed}), truth, job)
