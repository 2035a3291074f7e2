"""FSDP2's explicit prefetch lists of experts that are sharded apart: what they are, and that nothing else changes."""

from typing import Any

import pytest
import torch

from tests.dist import training
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import Job, Trained

JOB = Job(config=(("num_hidden_layers", 3), ("mlp_only_layers", (1,))), num_steps=2)
"""Layers with experts, without, and with."""


def before_fork(**_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(JOB)


def lists_of() -> dict[str, tuple[list[str], list[str]]]:
    """Names of what each FSDP module prefetches explicitly, in forward and in backward; of those that do."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule

    model = training.initial_model(JOB)
    model, _ = Accelerator().prepare(model, torch.optim.AdamW(model.parameters()))
    modules = {name: each for name, each in model.named_modules() if isinstance(each, FSDPModule)}
    names = {each._get_fsdp_state(): name for name, each in modules.items()}
    found = {}
    for name, module in modules.items():
        state = module._get_fsdp_state()
        lists = state._states_to_forward_prefetch, state._states_to_backward_prefetch
        if any(lists):
            assert _plain(name) not in found
            found[_plain(name)] = tuple([_plain(names[each]) for each in one] for one in lists)
    return found


def _plain(name: str) -> str:
    return name.replace("._checkpoint_wrapped_module", "")


EXPECTED = {
    "model.layers.0": (["model.layers.0.mlp.experts", "model.layers.1"], ["model.layers.0.mlp.experts"]),
    "model.layers.1": (["model.layers.2"], ["model.layers.0", "model.layers.0.mlp.experts"]),
    "model.layers.2": (["model.layers.2.mlp.experts"], ["model.layers.2.mlp.experts", "model.layers.1"]),
}


@pytest.mark.parametrize(
    ("ep_size", "checkpointing", "expected"),
    [
        (2, "true", EXPECTED),
        pytest.param(2, "false", EXPECTED, marks=pytest.mark.slow),
        (4, "false", {}),
        pytest.param(1, "false", {}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_asks_for_its_experts_and_for_the_next_layer(ep_size, checkpointing, expected):
    environment = with_moe_config(ep_size=ep_size) | {"FSDP_ACTIVATION_CHECKPOINTING": checkpointing}
    assert run_ranks(lists_of, 4, environment) == [expected] * 4


def test_nothing_is_asked_for_where_layers_are_not_sharded_by_themselves():
    """Recompute would ask in backward, for experts that are done: layers' own lists stop at that, experts' do not."""
    assert run_ranks(lists_of, 4, with_moe_config(ep_size=2) | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}) == [{}] * 4


def train(in_own_order: bool, gradient_checkpointing: str | None) -> Trained:
    """The job on this rank, with explicit lists or in FSDP2's own order."""
    from moe_accel import plugin

    if in_own_order:
        plugin.prefetch_experts = lambda model: None
    return training.on_ranks(JOB, gradient_checkpointing=gradient_checkpointing)


@pytest.mark.parametrize(
    "how", [None, "fsdp", *(pytest.param(f"{n}reentrant", marks=pytest.mark.slow) for n in ("", "non-"))]
)
def test_training_is_the_same_bit_for_bit_as_in_fsdps_own_order(how):
    environment = with_moe_config(ep_size=2) | {"FSDP_ACTIVATION_CHECKPOINTING": str(how == "fsdp").lower()}
    by_transformers = None if how == "fsdp" else how
    explicit, own = (
        run_ranks(train, 4, environment, in_own_order=own, gradient_checkpointing=by_transformers)
        for own in (False, True)
    )
    for one, other in zip(explicit, own, strict=True):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        assert one.weights.keys() == other.weights.keys()
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
