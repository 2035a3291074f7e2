"""What "the same training" means, in numbers: the comparison of a run on ranks with one process."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from tests.dist import training
from tests.dist.ranks import STOCK_FSDP2, run_ranks, with_moe_config
from tests.dist.training import MAX_NORM, Job, Trained, initial_model

TOLERANCE = 90 * torch.finfo(torch.float32).eps
"""Largest error of a loss or norm of the first step, and of a gradient as a share of the tensor's largest: 1e-5.
A value is a chain of sums of about 100 rounded products; its error walks sqrt(100)*eps = 10*eps, the worst of some
thousand values is 3 times that, and again 3 times through two layers and the loss."""

UPDATE_TOLERANCE = 5e-4
"""Largest error of a weight after the last step, as a share of the tensor's largest change; and of the later losses and
norms. Clipped to a norm of 0.25 a gradient is up to 0.05, wrong by up to TOLERANCE * 0.05 = 5e-7. AdamW multiplies that
by at most lr / eps = 10, three times over: 1.6e-5, where weights change by 3e-2."""


def train_on_ranks(job: Job, ep_size: int | None, variables: dict[str, str] | None = None, **how) -> Trained:
    """The job on its ranks, seen as a whole: mean losses, and what rank 0 gathered.

    Args:
        job: what to learn.
        ep_size: None for stock accelerate, without moe-accel.
        variables: of the launch, on top of those of an FSDP2 config.
        how: arguments of `training.on_ranks`; `moe_config` for further options of that section.
    """
    options = how.pop("moe_config", {})
    launch = STOCK_FSDP2 if ep_size is None else with_moe_config(ep_size=ep_size, **options)
    environment = {**launch, **(variables or {})}
    num_ranks = len(job.lengths)
    ranks = run_ranks(training.on_ranks, num_ranks, environment, job=job, **how)
    whole = ranks[0]
    assert (whole.experts_function == "moe_accel") == (ep_size is not None), whole.experts_function
    assert ("ep" in whole.experts_mesh) == (ep_size not in (None, 1)), whole.experts_mesh
    norms = torch.tensor([rank.norms for rank in ranks])
    assert torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-6, atol=0), f"ranks clip by other norms: {norms}"
    return as_one(ranks)


def as_one(ranks: Sequence[Trained]) -> Trained:
    """What ranks trained, seen as a whole: mean losses, and what rank 0 gathered."""
    losses = [sum(losses) / len(ranks) for losses in zip(*(rank.losses for rank in ranks), strict=True)]
    return dataclasses.replace(ranks[0], losses=losses)


def assert_same_training(tried: Trained, truth: Trained, job: Job) -> None:
    """Same losses, gradients, norms and weights, by name, within what fp32 rounding explains."""
    assert min(truth.norms) > MAX_NORM, "a norm below MAX_NORM would not test clipping"
    assert tried.losses[0] == pytest.approx(truth.losses[0], rel=TOLERANCE)
    assert_same_gradients(tried, truth)
    assert tried.norms[0] == pytest.approx(truth.norms[0], rel=TOLERANCE)
    assert tried.norms == pytest.approx(truth.norms, rel=UPDATE_TOLERANCE)
    assert tried.losses == pytest.approx(truth.losses, rel=UPDATE_TOLERANCE)
    assert_same_weights(tried, truth, job)


def assert_identical(tried: Trained, truth: Trained) -> None:
    """Losses, gradient norms and weights of a rank, to the last bit."""
    assert (tried.losses, tried.norms) == (truth.losses, truth.norms)
    assert tried.weights.keys() == truth.weights.keys()
    for key, expected in truth.weights.items():
        assert torch.equal(tried.weights[key], expected), key


def assert_same_gradients(tried: Trained, truth: Trained) -> None:
    assert tried.gradients.keys() == truth.gradients.keys()
    errors = {}
    for name, gradient in truth.gradients.items():
        ours = tried.gradients[name]
        if gradient is None:
            assert ours is None or not ours.any(), f"{name}: one process has no gradient"
            continue
        assert ours is not None, f"{name}: no gradient"
        errors[name] = largest_error(ours, gradient, gradient.abs().max())
    assert_all_small(errors, TOLERANCE, "gradients")


def assert_same_weights(tried: Trained, truth: Trained, job: Job) -> None:
    assert tried.weights.keys() == truth.weights.keys()
    before = initial_model(job).state_dict()
    errors = {
        name: largest_error(tried.weights[name], weight, (weight - before[name]).abs().max())
        for name, weight in truth.weights.items()
    }
    assert_all_small(errors, UPDATE_TOLERANCE, "weights")


def largest_error(tried: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference as a share of `scale`; 0 where there is none, also at scale 0; infinite for NaN and shapes."""
    if tried.shape != truth.shape or not tried.isfinite().all():
        return float("inf")
    error = (tried.double() - truth.double()).abs().max()
    return 0.0 if error == 0 else (error / scale).item()


def assert_all_small(errors: dict[str, float], tolerance: float, what: str) -> None:
    """All errors at once, the worst first: which tensors are wrong, and by what factor, tells what broke."""
    wrong = sorted((name for name, error in errors.items() if not error <= tolerance), key=errors.get, reverse=True)
    lines = [f"  {errors[name]:.1e}  {name}" for name in wrong]
    assert not wrong, f"{len(wrong)} of {len(errors)} {what} differ by more than {tolerance:.1e}:\n" + "\n".join(lines)
