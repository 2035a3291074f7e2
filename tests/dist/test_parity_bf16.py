"""Mixed precision: bf16 with expert parallelism is as good as stock FSDP2 with the same policy, which is the twin here.

A single process has no such policy: FSDP2 casts weights and activations themselves, where autocast casts inside of some
operations.
"""

import dataclasses

import pytest
import torch

from tests.dist.parity import train_on_ranks
from tests.dist.training import SEQUENCE, Job, reference

EPS = torch.finfo(torch.bfloat16).eps

WHOLE_TOLERANCE = 8 * EPS
"""Relative error of all gradients together, against the twin: 6%. A gradient is rounded at about 16 places on its way,
which walks sqrt(16)*eps = 4*eps; a token that changes its expert on a near tie counts for as much again."""

TENSOR_TOLERANCE = 16 * EPS
"""The same for one tensor: 12%. A token that changes its expert is 1/26 of what that expert sees, which is sqrt(1/26)
of the norm of its gradient and sqrt(1/26/8) = 7% of the norm of the whole stack's."""

SLACK = 1.2
"""How much farther from fp32 than the twin our gradients may be, which are rounded at about as many places."""


def relative_error(tried, truth):
    """Norm of the difference over the norm of the truth."""
    return ((tried.double() - truth.double()).norm() / truth.double().norm()).item()


def flat(gradients):
    return torch.cat([gradient.double().flatten() for _, gradient in sorted(gradients.items())])


@pytest.mark.parametrize(
    ("job", "ep_size"),
    [
        pytest.param(Job(), 1, id="ep1"),
        pytest.param(Job(), 2, id="ep2"),
        pytest.param(Job(), 4, id="ep4"),
        pytest.param(Job(dtype="bfloat16"), 2, id="ep2-weights-loaded-in-bf16"),
    ],
)
def test_bf16_training_is_that_of_stock_fsdp2_in_bf16(job, ep_size):
    twin = train_on_ranks(job, None, mixed_precision="bf16")
    ours = train_on_ranks(job, ep_size, mixed_precision="bf16")
    assert ours.losses == pytest.approx(twin.losses, rel=2 * EPS)
    assert ours.norms == pytest.approx(twin.norms, rel=WHOLE_TOLERANCE)
    assert ours.gradients.keys() == twin.gradients.keys()
    for name, gradient in twin.gradients.items():
        assert ours.gradients[name].dtype == gradient.dtype == torch.float32, name
        assert relative_error(ours.gradients[name], gradient) < TENSOR_TOLERANCE, name
    assert relative_error(flat(ours.gradients), flat(twin.gradients)) < WHOLE_TOLERANCE

    assert {name: weight.dtype for name, weight in ours.weights.items()} == dict.fromkeys(twin.weights, torch.float32)

    fp32 = flat(reference(Job()).gradients)
    assert relative_error(flat(ours.gradients), fp32) < SLACK * relative_error(flat(twin.gradients), fp32)


LORA = Job(
    dtype="bfloat16",
    num_steps=1,
    lengths=(SEQUENCE,) * 2,
    lora=(
        ("r", 4),
        ("target_modules", ("q_proj", "v_proj")),
        ("target_parameters", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    ),
)
"""PEFT's default: adapters in fp32 on a bf16 model."""


@pytest.mark.parametrize("ep_size", [1, 2])
def test_fp32_adapters_of_a_bf16_model_have_fp32_gradients_as_near_to_fp32_as_one_process_has(ep_size):
    ours = train_on_ranks(LORA, ep_size, mixed_precision="bf16")
    pefts, fp32 = reference(LORA).gradients, reference(dataclasses.replace(LORA, dtype="float32")).gradients
    ours, pefts, fp32 = (
        {k: each for k, each in of.items() if each is not None} for of in (ours.gradients, pefts, fp32)
    )
    assert ours.keys() == pefts.keys() == fp32.keys()
    assert {each.dtype for each in ours.values()} == {torch.float32}
    assert relative_error(flat(ours), flat(fp32)) < SLACK * relative_error(flat(pefts), flat(fp32))
