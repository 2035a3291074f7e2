"""What the ranks of a job say to each other, and to people."""

import atexit
import functools
import itertools
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_accel.errors import CheckpointError
from moe_accel.hooks import wrap

PATIENCE_S = 600.0
"""How long ranks look out for each other before they wait as torch does, until its timeout."""
FAILED = "moe_accel/failed"
_meetings = itertools.count()


def gather(value: Any, group: Any = None) -> list[Any]:
    """An object of every rank of the group, or of the job. A collective call."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def group_of_hosts() -> Any:
    """All ranks of the job, on gloo: what they say to each other there waits for no device. A collective call.

    They wait for each other as long as in the job's own group, where torch tells.
    """
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    options = _options_of(dist.group.WORLD)
    return dist.new_group(backend="gloo", timeout=options and options._timeout)


def urgent(group: Any) -> Any:
    """The ranks of a group over NCCL, whose kernels come before others that wait for multiprocessors of the GPU: what
    is computed while they exchange something would hold them up. The group itself where it is not NCCL's.

    A collective call of the job.
    """
    options = _options_of(group)
    if not dist.is_nccl_available() or not isinstance(options, dist.ProcessGroupNCCL.Options):
        return group
    if group not in _urgent:
        of_urgent, timeout = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True), options._timeout
        of_urgent._timeout = timeout
        members = dist.get_process_group_ranks(group)
        _urgent[group] = dist.new_group(members, timeout=timeout, backend="nccl", pg_options=of_urgent)
    return _urgent[group]


_urgent: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""By the group they are made for: a communicator takes memory, and one for all models is enough."""


def _options_of(group: Any) -> Any:
    """Of its backend for GPUs; None where torch, which has no public way to ask, does not tell."""
    with suppress(AttributeError, RuntimeError, TypeError):
        return group._get_backend(torch.device("cuda")).options
    return None


def before_groups_end(action: Callable[[Any], None]) -> None:
    """Have `action(group)` called before torch destroys a process group, None for all of them; and at exit."""
    if action not in _endings:
        _endings.append(action)
    wrap(dist, "destroy_process_group", _ending_first)
    _end_at_exit()


_endings: list[Callable[[Any], None]] = []


def _ending_first(original: Callable) -> Callable:
    """Around `torch.distributed.destroy_process_group`."""

    def destroy_process_group(group: Any = None) -> None:
        _end(None if group is dist.group.WORLD else group)
        original(group)

    return destroy_process_group


@functools.cache
def _end_at_exit() -> None:
    atexit.register(_end)


def _end(group: Any = None) -> None:
    for action in _endings:
        action(group)


def attempt_together(do: Callable[[], Any] | None, group: Any = None) -> str | None:
    """Call `do`, if there is anything to do here, and say what went wrong, on whichever rank, once all are through.

    A collective call.

    Returns:
        The error of the first rank of the group, or of the job, that has one, as a line; None where all went well.
    """
    problem = None
    try:
        if do is not None:
            do()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's own of a save collects those of all ranks, and is none of Exception
        *_, last = "", *str(error).strip().splitlines()
        problem = f"{type(error).__name__}: {last}"
    found = gather(problem, group) if _are_several() else [problem]
    return next((each for each in found if each is not None), None)


@contextmanager
def telling_others() -> Iterator[None]:
    """Leave word of an error that ends the block, for the other ranks to find in `meet`.

    No collective call: a rank may be the only one to come here.
    """
    try:
        yield
    except Exception as error:
        if _are_several():
            message = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            word = {"rank": dist.get_rank(), "message": message, "hint": getattr(error, "hint", None)}
            with suppress(Exception):  # the error itself is what counts
                distributed_c10d._get_default_store().set(FAILED, json.dumps(word))
        raise


def meet() -> None:
    """Wait until all ranks are here, or one has left word that it will not come. A collective call.

    Raises:
        CheckpointError: with the message of a rank that failed.
    """
    number = next(_meetings)
    if not _are_several():
        return
    store, here, pause_s = distributed_c10d._get_default_store(), f"moe_accel/met/{number}", 0.001
    if (word := _word(store)) is not None and word["rank"] == dist.get_rank():
        store.delete_key(FAILED)  # the script went on without
    missing, until = store.add(here, 1) < dist.get_world_size(), time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < until:
        if (word := _word(store)) is not None:
            raise CheckpointError(f"rank {word['rank']}: {word['message']}", word["hint"])
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)
        missing = store.add(here, 0) < dist.get_world_size()


def _word(store: Any) -> dict[str, Any] | None:
    """What a rank that failed has said."""
    return json.loads(store.get(FAILED)) if store.check([FAILED]) else None


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def tell(message: str) -> None:
    """Print a line to stderr on rank 0, which the launcher names before there is a process group."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"moe-accel: {message}", file=sys.stderr, flush=True)
