"""`kill -9` in the middle of Trainer's saves: `resume_from_checkpoint=True` always goes on, with the same losses."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import run_ranks
from tests.dist.test_kill import SAVE_S, die, killed
from tests.dist.test_resume import TWO_RANKS
from tests.dist.trainer_runs import ARGUMENTS, AUX_LOSS, FAMILY, before_fork, environment_of, examples  # noqa: F401
from tests.families import build_tiny

NUM_KILLS = 6
KEPT = 2


def train(folder: Path, stop_after: int, kill_s: float | None = None, victim: int = 0) -> None:
    """Do some steps with Trainer, each with a checkpoint, going on from the last one, if there is any.

    Args:
        folder: output_dir; loss and norm of every step are noted in steps.jsonl in it, before the step is saved.
        stop_after: steps to do; the last one's save is the one to be cut short.
        kill_s: seconds after that save has begun to kill a rank at; None: not at all.
        victim: the rank to kill.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    own = {"max_steps": 200, "save_steps": 1, "save_total_limit": KEPT, "lr_scheduler_type": "constant"}
    first: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            first.append(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == first[0] + stop_after
            if control.should_training_stop and kill_s is not None and args.process_index == victim:
                threading.Thread(target=die, args=(folder, ".saving", kill_s), daemon=True).start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if args.process_index == 0 and "grad_norm" in logs:
                with (folder / "steps.jsonl").open("a") as file:
                    file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")

    trainer = Trainer(
        model=build_tiny(FAMILY, **AUX_LOSS),
        args=TrainingArguments(str(folder), **{**ARGUMENTS, **own}),
        train_dataset=examples(64, seed=0),
        callbacks=[Watch],
    )
    trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
    if kill_s is not None:
        threading.Event().wait(2 * SAVE_S + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL", "SHARDED", "SHARDED-async"])
def test_after_kills_in_the_middle_of_its_saves_trainer_goes_on_with_the_same_losses(tmp_path, kind):
    environment, draw = environment_of(TWO_RANKS, kind.removesuffix("-async")), random.Random(NUM_KILLS)
    if kind.endswith("-async"):
        environment["MOE_ACCEL_CONFIG"] = json.dumps({"ep_size": 2, "async_save": True})
    folder, whole = tmp_path / "killed", tmp_path / "uninterrupted"
    folder.mkdir()
    whole.mkdir()
    run_ranks(train, 2, environment, folder=folder, stop_after=1)
    cut_short = 0
    for kill in range(NUM_KILLS):
        kill_s = draw.uniform(0, SAVE_S) if kill else 0
        killed(folder, train, 2, environment, stop_after=2, kill_s=kill_s, victim=kill % 2)
        cut_short += (folder / ".saving").exists()
    run_ranks(train, 2, environment, folder=folder, stop_after=1)
    assert cut_short, "no kill hit a save"
    assert not (folder / ".saving").exists()

    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    reached = max(step for step, *_ in steps)
    assert reached >= NUM_KILLS + 2, "each run saved at least its first step"
    kept = {f"checkpoint-{reached - back}" for back in range(KEPT)}
    assert {each.name for each in folder.glob("checkpoint-*")} == kept
    run_ranks(train, 2, environment, folder=whole, stop_after=reached)
    lines = (whole / "steps.jsonl").read_text().splitlines()
    truth = {step: rest for step, *rest in map(json.loads, lines)}
    assert len(truth) == reached
    assert [rest for _, *rest in steps] == [truth[step] for step, *_ in steps], "bit for bit, repeated steps too"
