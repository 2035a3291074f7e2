"""Periodic checkpoints that are written while training goes on: `async_save: true` in `moe_config`.

    save_state, Trainer's checkpoint-N
        what torch.distributed.checkpoint would write, this rank's shards, is copied to the host; the rest is written
        at once; then they return
    a thread
        writes the copies, over a process group of its own, and when all ranks have, the folder gets its name

Until then there is no folder of that name, or the one before, and nobody resumes from what lies beside. One save is
under way at a time: the next one waits for it, and so do loading, the last checkpoint of a Trainer, `end_training` and
the end of the process.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from accelerate import Accelerator
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from moe_accel.errors import CheckpointError
from moe_accel.ranks import attempt_together, tell

_Problem = tuple[str, str | None]
"""Message and hint of a `CheckpointError`."""
_dcp: Any = torch.distributed.checkpoint


class _Save:
    """What is under way for one Accelerator."""

    def __init__(self) -> None:
        self.copies: list[Callable[..., Any]] = []
        self.group: Any = None
        self.thread: Thread | None = None
        self.problem: _Problem | None = None
        self.told = False


_saves: WeakKeyDictionary[Accelerator, _Save] = WeakKeyDictionary()


@contextmanager
def copying(accelerator: Accelerator) -> Iterator[None]:
    """While the block runs, what is given to `torch.distributed.checkpoint.save` is copied, to be written later.

    Nothing where `async_save` is off, or there is one process without process groups.
    """
    if not getattr(accelerator.parallelism_config, "async_save", False) or not dist.is_initialized():
        yield
        return
    save = _saves.setdefault(accelerator, _Save())
    original = _dcp.save

    def copy(state_dict: Any, **how: Any) -> None:
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage(state_dict)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        save.copies.append(partial(original, staged, **how))

    _dcp.save = copy
    try:
        yield
    except BaseException:
        save.copies.clear()
        raise
    finally:
        _dcp.save = original


def place(
    accelerator: Accelerator,
    folder: Path,
    rename: Callable[[Any], str | None],
    tidy: Callable[[], None],
    wait: bool = False,
) -> None:
    """Give a checkpoint its name: at once where all of it is written, else in a thread that writes the rest before.

    A collective call.

    Args:
        accelerator: whose checkpoint it is.
        folder: its name, for messages.
        rename: puts it in its place, and returns what went wrong on whichever rank; called on every rank, when all have
            written, with the process group over which they wait for each other.
        tidy: removes what the checkpoint is instead of, once it has its name; called on every rank.
        wait: until it is done.

    Raises:
        CheckpointError: on every rank, with `wait` or where nothing is written in a thread: see `wait_for_save`.
    """
    save, placed = _saves.get(accelerator), partial(_placed, folder, rename, tidy)
    if save is None or not save.copies:
        if save is not None and accelerator.is_fsdp2 and not save.told:
            save.told = True
            tell("async_save: only fsdp_state_dict_type SHARDED_STATE_DICT is written while training goes on")
        accelerator.wait_for_everyone()
        _raise(placed(None))
        return
    copies, save.copies = save.copies, []
    if save.group is None:
        save.group = dist.new_group(backend="gloo")  # training's own collectives go on meanwhile
    save.thread = Thread(target=_write, args=(save, copies, folder, placed), name=f"writing {folder.name}")
    save.thread.start()
    if wait:
        wait_for_save(accelerator)


def _write(save: _Save, copies: list[Callable[..., Any]], folder: Path, placed: Callable[[Any], Any]) -> None:
    def write() -> None:
        while copies:
            copies.pop(0)(process_group=save.group)

    try:
        problem = attempt_together(write, save.group)
        save.problem = placed(save.group) if problem is None else _not_saved(folder, problem)
    except Exception as error:  # the ranks cannot reach each other
        save.problem = _not_saved(folder, f"{type(error).__name__}: {error}")
    if save.problem is not None:
        print(f"moe-accel: {save.problem[0]}", file=sys.stderr, flush=True)


def _placed(folder: Path, rename: Callable[[Any], str | None], tidy: Callable[[], None], group: Any) -> _Problem | None:
    """Give a checkpoint that is whole its name; what went wrong, the same on every rank."""
    problem = rename(group)
    if problem is not None:
        return _not_saved(folder, problem)
    problem = attempt_together(tidy, group)
    return None if problem is None else (f"{folder} is saved, but what it replaces was not removed: {problem}", None)


def _not_saved(folder: Path, problem: str) -> _Problem:
    return f"{folder} was not saved: {problem}", "the checkpoint before it is untouched"


def _raise(problem: _Problem | None) -> None:
    if problem is not None:
        raise CheckpointError(*problem)


def wait_for_save(accelerator: Accelerator) -> None:
    """Wait until the checkpoint that is being written has its name; nothing where there is none.

    Raises:
        CheckpointError: it could not be written; the one before it is untouched.
    """
    save = _saves.get(accelerator)
    if save is None or save.thread is None:
        return
    save.thread.join()
    save.thread = None
    problem, save.problem = save.problem, None
    _raise(problem)


def waiting(original: Callable) -> Callable:
    """Around `Accelerator.end_training`, which takes the process groups away."""

    def end_training(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        wait_for_save(self)
        return original(self, *args, **kwargs)

    return end_training
