"""TRL's SFTTrainer with CUDA graphs, which are pretended: ragged rows, and the aux loss that is its default."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist import test_trl
from tests.dist.block_graphs import PLAYED, seen
from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks
from tests.dist.test_resume import TWO_RANKS
from tests.dist.trainer_runs import ARGUMENTS, environment_of

STEPS = 18


def before_fork(**_: Any) -> None:
    test_trl.before_fork()


def sft_seen(folder: Path) -> dict[str, Any]:
    """Losses and norms of a run, and what ranks decided."""
    with seen() as found:
        fit = test_trl.sft(folder, arguments={"max_steps": STEPS, "save_strategy": "no"})
    return {"losses": fit.losses, "norms": fit.norms, **found}


def launched(folder: Path, **more: Any) -> list[dict[str, Any]]:
    environment = environment_of(TWO_RANKS, "FULL") | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    config = json.loads(environment["MOE_ACCEL_CONFIG"]) | more
    return run_ranks(sft_seen, 2, environment | {"MOE_ACCEL_CONFIG": json.dumps(config)}, folder=folder)


def test_ragged_rows_with_the_aux_loss_are_played_and_train_as_without(tmp_path):
    ours, theirs = launched(tmp_path / "ours", cuda_graphs=True), launched(tmp_path / "theirs")
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert one["norms"] == pytest.approx(other["norms"], rel=UPDATE_TOLERANCE)
        assert not other["decided"]
    assert ours[0]["decided"] == ours[1]["decided"]
    assert len(ours[0]["decided"]) == STEPS * ARGUMENTS["gradient_accumulation_steps"]
    assert ours[0]["decided"].count(PLAYED) > STEPS
    assert ours[0]["decided"][-1] == PLAYED
