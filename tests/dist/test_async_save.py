"""`async_save`: states written while training goes on are those of their step, and a failed write spoils nothing."""

import errno
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_accel.checkpoint.background import wait_for_save
from moe_accel.errors import CheckpointError
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.test_resume import (
    EP1,
    EP2,
    NUM_STEPS,
    assert_goes_on,
    assert_loaded,
    before_fork,  # noqa: F401
    resume,
    spread,
    uninterrupted,  # noqa: F401
)
from tests.families import build_tiny


def test_what_is_written_while_training_goes_on_is_the_state_of_its_step(uninterrupted, tmp_path):  # noqa: F811
    run, _ = uninterrupted(EP2, "SHARDED", "qwen3_moe")
    folder, options = tmp_path / "state", {"async_save": True}
    late = spread(
        EP2, "SHARDED", options, family="qwen3_moe", steps=range(NUM_STEPS), save_to=folder, written_after_s=1.0
    )
    assert (late.losses, late.norms) == (run.losses, run.norms)
    resumed = resume(EP1, "SHARDED", "qwen3_moe", folder)
    assert_loaded(resumed, run)
    assert_goes_on(resumed, run)


def failed_write(family: str, folder: Path, victim: int) -> tuple[str, list[bool]]:
    """Save two states; writing the second fails on one rank: what the next save says, and what is there."""
    from accelerate import Accelerator

    dcp: Any = torch.distributed.checkpoint
    accelerator = Accelerator()
    model = build_tiny(family)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.save_state(folder / "first")
    accelerator.save_state(folder / "second")  # waits for the first
    save, dcp.save = dcp.save, functools.partial(fail_on, accelerator.process_index == victim, dcp.save)
    accelerator.save_state(folder / "second")
    dcp.save = save
    with pytest.raises(CheckpointError) as error:
        accelerator.load_state(folder / "first")
    accelerator.save_state(folder / "third")
    accelerator.load_state(folder / "second")
    accelerator.load_state(folder / "third")
    accelerator.wait_for_everyone()
    return error.value.message, [(folder / name).is_dir() for name in ("first", "second", "third")]


def fail_on(here: bool, save: Any, state_dict: Any, storage_writer: Any, **how: Any) -> Any:
    """Save; `here` the disk is full. An error outside of torch's own steps would leave the other rank waiting."""

    def write_data(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if here:
        storage_writer.write_data = write_data
    return save(state_dict, storage_writer=storage_writer, **how)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_write_that_fails_is_told_by_the_next_call_and_spoils_nothing(tmp_path, victim):
    environment = {**with_moe_config(ep_size=2, async_save=True), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    for message, there in run_ranks(failed_write, 2, environment, family="qwen3_moe", folder=tmp_path, victim=victim):
        assert re.match(rf"{re.escape(str(tmp_path / 'second'))} was not saved: .*No space left on device", message)
        assert there == [True] * 3


def failed_place(family: str, folder: Path) -> list[tuple[str, str | None]]:
    """Save three states; one cannot get its name, of another what it replaces cannot go: what ranks are told."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from moe_accel.checkpoint import periodic

    accelerator = Accelerator(project_config=ProjectConfiguration(str(folder), total_limit=1))
    accelerator.project_configuration.automatic_checkpoint_naming = True
    model = build_tiny(family)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    told = []

    def save(broken: str, function: Any) -> None:
        original = vars(periodic)[broken]
        setattr(periodic, broken, function)
        try:
            accelerator.save_state()
            wait_for_save(accelerator)
        except CheckpointError as error:
            told.append((error.message, error.hint))
        setattr(periodic, broken, original)

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    save("numbered_states", periodic.numbered_states)
    save("place_folder", denied)  # rank 0 alone calls it
    accelerator.project_configuration.iteration = 2
    save("numbered_states", denied)  # so with this
    accelerator.project_configuration.iteration = 3
    save("numbered_states", periodic.numbered_states)
    accelerator.wait_for_everyone()
    return told


@pytest.mark.parametrize("async_save", [False, True])
def test_a_folder_that_cannot_get_its_name_is_told_on_every_rank(tmp_path, async_save):
    environment = {**with_moe_config(ep_size=2, async_save=async_save), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    found = run_ranks(failed_place, 2, environment, family="qwen3_moe", folder=tmp_path)
    name, error = tmp_path / "checkpoints" / "checkpoint_{}", "PermissionError: [Errno 13] Permission denied"
    whole = f"{name} is saved, but what it replaces was not removed: {error}".format(2), None
    assert found == [[(f"{name} was not saved: {error}".format(1), "the checkpoint before it is untouched"), whole]] * 2
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_3"]
