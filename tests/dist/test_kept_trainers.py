"""`kept_layers: auto` under HF's Trainer and TRL's SFTTrainer: layers are kept, and losses are those without."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.test_trl import sft
from tests.dist.trainer_runs import FAMILY, NUM_STEPS, fit
from tests.families import model_class

BASE, TOKENS, NUM_LAYERS = 10_000, 26, 2
CHECKPOINTED = {"gradient_checkpointing": True, "save_strategy": "no", "gradient_accumulation_steps": 1}
NON_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
TRAINERS = {"trainer": fit, "sft": sft}


def before_fork(trainer: str = "trainer", **_: Any) -> None:
    """Import what all ranks need."""
    import transformers.trainer  # noqa: F401

    if trainer == "sft":
        from trl import SFTTrainer  # noqa: F401
    model_class(FAMILY)


def train(
    trainer: str, folder: Path, arguments: dict[str, Any], room: int
) -> tuple[list[float], list[tuple[int, ...]]]:
    """Losses, and what was kept in each training forward, on a device with room for so many layers of 26 tokens."""
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    from moe_accel.kept import memory
    from tests.fake_memory import FakeMemory

    total = round((BASE + (NUM_LAYERS + 1) * TOKENS + room * 30 * TOKENS + 1) / (1 - memory.MARGIN))
    device = FakeMemory(total, BASE, lambda tokens: 31 * tokens)
    memory.memory_of = lambda _device: device
    seen: list[tuple[int, ...]] = []

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        if type(module).__name__ == "Qwen3MoeModel":
            layers = [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]
            seen.append(tuple(at for at, layer in enumerate(layers) if not layer.gradient_checkpointing))

    nn.modules.module.register_module_forward_hook(after)
    return TRAINERS[trainer](folder, arguments={**CHECKPOINTED, **arguments}).losses, seen


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("accumulation", [1, slow(2)])
@pytest.mark.parametrize("given", [{}, slow(NON_REENTRANT)], ids=["default", "non-reentrant"])
@pytest.mark.parametrize(("trainer", "num_ranks"), [("sft", 1), slow("trainer", 1), slow("trainer", 2), slow("sft", 2)])
def test_losses_are_those_without_and_layers_are_kept(tmp_path, trainer, num_ranks, given, accumulation):
    arguments = {**given, "gradient_accumulation_steps": accumulation}
    how = {"trainer": trainer, "folder": tmp_path, "arguments": arguments, "room": NUM_LAYERS}
    results = {}
    for kept in (0, "auto"):
        environment = with_moe_config(ep_size=num_ranks, kept_layers=kept)
        if num_ranks == 1:
            environment = {"MOE_ACCEL_CONFIG": environment["MOE_ACCEL_CONFIG"]}
        results[kept] = run_ranks(train, num_ranks, environment, **how)
    for (losses, seen), (expected, none_kept) in zip(results["auto"], results[0], strict=True):
        assert set(none_kept) == {()}
        forwards = [seen[step * accumulation : (step + 1) * accumulation] for step in range(NUM_STEPS)]
        kept_by_step = [set(each) for each in forwards]
        assert kept_by_step == [{()}, {()}, {(1,)}] + [{(0, 1)}] * (NUM_STEPS - 3)
        assert losses == pytest.approx(expected, rel=UPDATE_TOLERANCE)
