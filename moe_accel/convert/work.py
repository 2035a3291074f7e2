"""Threads that stop together: at the first failure, or when the user presses Ctrl-C."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from moe_accel.convert.copy import Files, Stopped

BATCH_BYTES = 64 << 20
"""About what a thread takes at a time."""


class Progress(Protocol):
    """Told of bytes as they are done, from any thread. `kind` is "copy" or "check"."""

    def __call__(self, kind: str, num_bytes: int) -> None:
        """`num_bytes` more are done."""
        ...


def silent(kind: str, num_bytes: int) -> None:
    """No progress shown."""


def default_threads() -> int:
    """As many as there are cores, at most four: more do not make a disk faster."""
    return max(1, min(4, os.cpu_count() or 1))


@contextmanager
def workers(threads: int, files: Files) -> Iterator[ThreadPoolExecutor]:
    """A pool; when the block fails, its threads stop within one system call and have ended on exit."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    try:
        yield pool
    except BaseException:
        files.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        files.close()


def run_all(pool: ThreadPoolExecutor, files: Files, tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of `tasks`, in order. The first failure stops the others and is raised."""
    return list(in_order(pool, files, tasks, ahead=sys.maxsize))


def in_order(pool: ThreadPoolExecutor, files: Files, tasks: Iterable[Callable[[], Any]], ahead: int) -> Iterator[Any]:
    """The results of `tasks`, in order, as they come; at most `ahead` of them are begun before theirs is taken.

    The first failure stops the others and is raised.
    """
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except Exception as error:
        files.stop.set()
        failures = [error, *(found for each in waiting if (found := each.exception()) is not None)]
        raise next((each for each in failures if not isinstance(each, Stopped)), error) from None


def in_batches(items: Iterable[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Lists of items of about `BATCH_BYTES` together."""
    lists: list[list[Any]] = [[]]
    total = 0
    for item in items:
        if total + size(item) > BATCH_BYTES and lists[-1]:
            lists.append([])
            total = 0
        lists[-1].append(item)
        total += size(item)
    return [each for each in lists if each]
