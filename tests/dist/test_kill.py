"""`kill -9` in the middle of saves: training always goes on from a whole checkpoint, with the same losses.

A run saves its state after every step. A thread kills a rank, 0 and 1 in turn, at a random moment of a save, which ends
all of them. The next run resumes what is there. What is lost is at most the step whose save was cut short.
"""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ranks import RankError, run_ranks, with_moe_config
from tests.dist.test_resume import NUM_SEQUENCES, SEQUENCE, before_fork  # noqa: F401
from tests.dist.training import OPTIMIZER
from tests.families import build_tiny, tiny_inputs, tiny_loss

NUM_STEPS = 200
"""More than any run gets to: each is killed, but the last, which does one step."""

KILLED = "killed"
"""Written by the thread that kills, as the last thing."""

SAVE_S = 0.25
"""About as long as the save of a tiny state takes; moments are drawn from it, and a little beyond."""


def train(
    family: str, folder: Path, stop_after: int, automatic: bool, kill_s: float | None = None, victim: int = 0
) -> list[float]:
    """Resume, if there is anything to resume, then step and save; the losses of this run's steps.

    Args:
        family: of the model.
        folder: where states are saved; every loss is noted in losses.jsonl beside them.
        stop_after: steps to do; the last one's save is the one to be cut short.
        automatic: name the states by accelerate's automatic checkpoint naming, keeping one; else overwrite one.
        kill_s: seconds after that save's first folder appears to kill a rank at; None: not at all.
        victim: the rank to kill.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=automatic, total_limit=1)
    accelerator = Accelerator(project_config=project)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    model = build_tiny(family)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), **OPTIMIZER))
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    if (folder / "losses.jsonl").exists():  # some run has done a step
        accelerator.load_state(None if automatic else folder / "state")
        project.iteration = counter.step
    losses = []
    for done in range(stop_after):
        inputs = tiny_inputs(family, NUM_SEQUENCES, SEQUENCE, seed=counter.step)
        mine = {name: tensor[rank::num_ranks] for name, tensor in inputs.items()}
        loss = tiny_loss(model, mine)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0:
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps([counter.step, loss.item()]) + "\n")
        counter.step += 1
        if kill_s is not None and done == stop_after - 1 and rank == victim:
            threading.Thread(target=die, args=(folder, ".*.saving", kill_s), daemon=True).start()
        accelerator.save_state(None if automatic else folder / "state")
        if rank == 0:
            (folder / "losses.jsonl").touch()
    if kill_s is not None:
        threading.Event().wait(2 * SAVE_S + 1)
    accelerator.end_training()
    return losses


def die(folder: Path, staging: str, after_s: float) -> None:
    """Kill this process a while after a save has begun to write, which a folder of the name `staging` shows."""
    while not list(folder.glob(staging)):
        time.sleep(1e-3)
    time.sleep(after_s)
    (folder / KILLED).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, function: Any, num_ranks: int, environment: dict[str, str], **how: Any) -> None:
    """A run that ends because one of its ranks is killed, and for no other reason."""
    with pytest.raises(RankError, match="ended with"):  # which rank's end is seen first is chance
        run_ranks(function, num_ranks, environment, folder=folder, **how)
    (folder / KILLED).unlink()


class Counter:
    """The step that comes next, as part of the state."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


@pytest.mark.parametrize(
    ("num_kills", "automatic", "in_background"),
    [
        pytest.param(2, True, False, id="2-automatic-naming"),
        *(
            pytest.param(20, automatic, in_background, id=f"20-{name}", marks=pytest.mark.slow)
            for name, automatic, in_background in (
                ("one-folder", False, False),
                ("automatic-naming", True, False),
                ("async", True, True),
            )
        ),
    ],
)
def test_after_kills_in_the_middle_of_saves_training_goes_on_with_the_same_losses(
    tmp_path, num_kills, automatic, in_background
):
    environment = with_moe_config(ep_size=2, async_save=in_background)
    draw = random.Random(num_kills)
    how = {"family": "qwen3_moe", "automatic": automatic}
    run_ranks(train, 2, environment, folder=tmp_path, stop_after=1, **how)
    cut_short = 0
    for kill in range(num_kills):
        kill_s = draw.uniform(0, SAVE_S) if kill else 0
        killed(tmp_path, train, 2, environment, stop_after=2, kill_s=kill_s, victim=kill % 2, **how)
        cut_short += bool(list(tmp_path.glob(".*.saving")))
    run_ranks(train, 2, environment, folder=tmp_path, stop_after=1, **how)
    assert cut_short, "no kill hit a save"

    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    reached = max(step for step, _ in steps) + 1
    assert reached >= num_kills + 2, "each run saved at least its first step"
    whole = tmp_path / "uninterrupted"
    whole.mkdir()
    losses = run_ranks(train, 2, environment, folder=whole, stop_after=reached, **how)[0]
    assert [loss for _, loss in steps] == [losses[step] for step, _ in steps], "bit for bit, repeated steps too"
    shutil.rmtree(whole)
