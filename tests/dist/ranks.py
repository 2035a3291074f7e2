"""Runs a function on several gloo ranks in seconds: the harness of the parity tests.

Importing torch, transformers and accelerate takes a process ten seconds, so one process imports them once a session
(`zygote.py`) and every case runs in forks of it. A fork starts without accelerate's singletons, process groups and
patches, so cases cannot disturb each other.
"""

import functools
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.gpu.processes import FSDP2, free_port

ROOT = Path(__file__).resolve().parents[2]

STOCK_FSDP2 = FSDP2
"""What `accelerate launch` exports for a plain FSDP2 config. Without MOE_ACCEL_CONFIG that is stock accelerate."""


CRASHES = ("SIGSEGV", "SIGABRT")
"""How gloo ends a process, about once in a thousand runs, by freeing a buffer twice in a thread of its own (the stack:
AsyncAllgatherCoalescedWork, ~AllgatherOptions, ~UnboundBuffer; torch 2.13, stock accelerate too)."""


class RankError(Exception):
    """A rank raised, died or ran out of time; holds every rank's traceback and the end of its stderr."""


def with_moe_config(**options: Any) -> dict[str, str]:
    """The variables of a launch with this `moe_config` section, with `padding_free: off` where it is not given.

    Most batches of tests have no padding, and its proof takes every rank 0.3 s of a core.
    """
    return {**STOCK_FSDP2, "MOE_ACCEL_CONFIG": json.dumps({"padding_free": "off"} | options)}


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    environment: Mapping[str, str] = STOCK_FSDP2,
    timeout_s: float = 120,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(**kwargs)` on every rank and return what each returned, rank 0 first.

    Args:
        function: module-level function. A function `before_fork` beside it is called first, with the same `kwargs`, in
            the process that is forked: for imports only, as threads do not survive a fork.
        num_ranks: processes. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as a launcher does.
        environment: variables of the launch. MOE_ACCEL_CONFIG activates moe-accel, as its autoload would.
        timeout_s: seconds after which all ranks are killed.
        kwargs: of the function; pickled, like its results.

    Raises:
        RankError: as soon as one rank fails; the others are killed. Several ranks of which one crashed (`CRASHES`) are
            run once more with a RuntimeWarning, and a second crash is raised.
    """
    __tracebackhide__ = True  # what the ranks say is the story
    try:
        return _run_once(function, num_ranks, environment, timeout_s, kwargs)
    except RankError as error:
        first_line = str(error).splitlines()[0]
        if num_ranks == 1 or not any(signal in first_line for signal in CRASHES):
            raise
        warnings.warn(f"a rank crashed, all are run again: {error}", RuntimeWarning, stacklevel=2)
    return _run_once(function, num_ranks, environment, timeout_s, kwargs)


def _run_once(
    function: Callable[..., Any],
    num_ranks: int,
    environment: Mapping[str, str],
    timeout_s: float,
    kwargs: dict[str, Any],
) -> list[Any]:
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "function": (function.__module__, function.__qualname__),
            "kwargs": pickle.dumps(kwargs),
            "num_ranks": num_ranks,
            "environment": {**_rendezvous(num_ranks), **environment},
            "folder": folder,
            "timeout_s": timeout_s,
        }
        failure = _zygote().ask(request)
        if failure:
            raise RankError(failure + _what_ranks_said(Path(folder), num_ranks))
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(num_ranks)]


def run_alone(function: Callable[..., Any], **kwargs: Any) -> Any:
    """Call `function(**kwargs)` in one process that no launcher started."""
    return run_ranks(function, 1, {}, **kwargs)[0]


def _rendezvous(num_ranks: int) -> dict[str, str]:
    if num_ranks == 1:
        return {}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **({"GLOO_SOCKET_IFNAME": loopback} if loopback else {}),
    }


def _what_ranks_said(folder: Path, num_ranks: int) -> str:
    """Tracebacks, the first to fail first, then the end of what every rank printed."""
    failed = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
    parts = [f"\n--- rank {file.stem} raised\n{file.read_text()}" for file in failed]
    for rank in range(num_ranks):
        printed = Path(folder, f"{rank}.output")
        if printed.exists() and printed.stat().st_size:
            parts.append(f"\n--- rank {rank} printed\n{printed.read_text(errors='replace')[-3000:]}")
    return "".join(parts)


class _Zygote:
    """The process that is forked, and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        launch = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MOE_ACCEL", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(launch)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.zygote", str(theirs.fileno())],
            cwd=ROOT,
            env={**clean, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def ask(self, request: dict[str, Any]) -> str:
        """What went wrong with the request, "" if nothing did."""
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except EOFError:
            code = self.process.wait()
            stop_zygote()
            raise RankError(f"the process that starts the ranks ended with exit code {code}") from None
        except BaseException:  # a test timeout: the answer to this request must not become that of the next
            stop_zygote()
            raise


@functools.cache
def _zygote() -> _Zygote:
    return _Zygote()


def stop_zygote() -> None:
    """End the forked-from process, and with it any ranks; the next `run_ranks` starts another."""
    if _zygote.cache_info().currsize:
        zygote = _zygote()
        zygote.pipe.close()  # which it notices within milliseconds, whatever it does
        zygote.process.wait()
        _zygote.cache_clear()
