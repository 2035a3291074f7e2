"""Periodic checkpoints that a kill cannot spoil: written beside, under a name that nobody resumes from, then renamed.

    accelerator.save_state(folder)      in .folder.saving, which takes the place of folder when every rank is done
    Trainer's checkpoint-N              in .saving/checkpoint-N; moved, and only then are older ones deleted

What is in them is accelerate's and Trainer's own. With `async_save` they are written while training goes on: see
`background.py`.
"""

import os
import shutil
import sys
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from moe_accel.checkpoint.background import copying, place, wait_for_save
from moe_accel.checkpoint.publish import place_folder, recover_folder, staging_name
from moe_accel.errors import CheckpointError
from moe_accel.ranks import attempt_together, tell

TRAINER_STAGING = ".saving"


def around_save_state(original: Callable, installed: Container[Accelerator]) -> Callable:
    """Around `Accelerator.save_state`."""

    def save_state(self: Accelerator, output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        project = self.project_configuration
        if self not in installed or self.distributed_type == DistributedType.DEEPSPEED:
            return original(self, output_dir, *args, **kwargs)
        wait_for_save(self)
        if project.automatic_checkpoint_naming:
            folder, staging = _automatic_folder(self)
        elif output_dir is None:
            return original(self, output_dir, *args, **kwargs)
        else:
            folder = Path(output_dir).expanduser().resolve()
            staging = staging_name(folder)
        if os.path.ismount(folder):
            tell(f"{folder} is a mount point, which cannot be renamed: a kill while saving would spoil the state in it")
            return original(self, output_dir, *args, **kwargs)
        _begin(self, staging, folder)
        automatic, project.automatic_checkpoint_naming = project.automatic_checkpoint_naming, False
        try:
            with copying(self):
                original(self, str(staging), *args, **kwargs)
        finally:
            project.automatic_checkpoint_naming = automatic

        def tidy() -> None:
            if automatic and self.is_main_process and project.total_limit is not None:
                for old in numbered_states(folder.parent)[project.total_limit :]:
                    shutil.rmtree(old)

        place(self, folder, partial(_rename, self, staging, folder), tidy)
        return str(folder) if automatic else output_dir

    return save_state


def _automatic_folder(accelerator: Accelerator) -> tuple[Path, Path]:
    project_dir = Path(accelerator.project_dir)
    folder = project_dir / "checkpoints" / f"checkpoint_{accelerator.save_iteration}"
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists already, and automatic checkpoint naming would write it again",
            "set accelerator.project_configuration.iteration to the number of the next one",
        )
    return folder, project_dir / f".{folder.name}.saving"  # not among those that accelerate counts


def around_save_checkpoint(original: Callable, installed: Container[Accelerator]) -> Callable:
    """Around `Trainer._save_checkpoint`."""

    def save_checkpoint(self: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.accelerator not in installed or self.is_deepspeed_enabled or self.args.push_to_hub:
            return original(self, model, trial, *args, **kwargs)
        trainer_module: Any = sys.modules["transformers.trainer"]
        wait_for_save(self.accelerator)
        run = self._get_output_dir(trial=trial)
        staged_run = Path(run, TRAINER_STAGING)
        name = f"{trainer_module.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        _begin(self.accelerator, staged_run, Path(run, name))
        self.__dict__["_get_output_dir"] = lambda trial=None: str(staged_run)
        try:
            with copying(self.accelerator):
                original(self, model, trial, *args, **kwargs)
        finally:
            del self.__dict__["_get_output_dir"]
        if self.state.best_model_checkpoint == os.path.join(staged_run, name):
            self.state.best_model_checkpoint = os.path.join(run, name)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged_run, name, trainer_module.TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint

        def tidy() -> None:
            if self.args.should_save:
                shutil.rmtree(staged_run, ignore_errors=True)
                trainer_module.rotate_checkpoints(
                    output_dir=run,
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=best,
                    use_mtime=True,
                )

        # Trainer looks at its folders once more when it ends.
        is_last = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        rename = partial(_rename, self.accelerator, staged_run / name, Path(run, name))
        place(self.accelerator, Path(run, name), rename, tidy, wait=is_last)
        return None

    return save_checkpoint


def _begin(accelerator: Accelerator, staging: Path, folder: Path) -> None:
    """An empty folder to write in, on every host."""
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        recover_folder(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def _rename(accelerator: Accelerator, staging: Path, folder: Path, group: Any) -> str | None:
    """Once every rank has written: by rank 0, then on the hosts that have folders of their own.

    Returns:
        What went wrong, on whichever rank.
    """
    is_main = accelerator.is_main_process

    def place_here() -> None:
        if staging.is_dir():
            place_folder(staging, folder)

    problem = attempt_together(partial(place_folder, staging, folder) if is_main else None, group)
    if problem is not None:
        return problem
    return attempt_together(place_here if accelerator.is_local_main_process and not is_main else None, group)


def numbered_states(folder: Path) -> list[Path]:
    """The folders of automatic checkpoint naming, the latest first."""
    numbered = {}
    for each in folder.glob("*"):
        digits = each.name.rpartition("_")[2]
        if each.is_dir() and not each.name.startswith(".") and digits.isdecimal():
            numbered[int(digits)] = each
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def tell_of_unfinished(folder: Path, staged: list[Path]) -> None:
    """Say which saves were cut short, if any; they are left out, and removed by the next save."""
    for each in staged:
        if each.is_dir() and any(each.iterdir()):
            names = sorted(child.name for child in each.iterdir()) if each.name == TRAINER_STAGING else [each.name]
            tell(f"a save was cut short and is left out ({', '.join(names)}): going on from {folder}")
