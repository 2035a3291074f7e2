"""The process that ranks are forked from. `python -m tests.dist.zygote FD`: started by `ranks.py`, talks over FD.

It imports and never computes: threads, which the first autograd or OpenMP call starts, do not survive a fork.
"""

import faulthandler
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers  # noqa: F401

GRACE_S = 0.5
"""How long ranks may go on after the first has failed, to write down errors of their own."""


def main() -> NoReturn:
    """Answer requests until the other end of the pipe is closed."""
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            os._exit(0)  # torch's own exit handlers take a second
        answer = _serve(request, pipe)
        if not pipe.poll():
            pipe.send(answer)


def _serve(request: dict[str, Any], pipe: Connection) -> str:
    """Run one request's ranks; "" when every rank has written its result, else what went wrong."""
    module, name = request["function"]
    kwargs = pickle.loads(request["kwargs"])
    try:
        function = getattr(importlib.import_module(module), name)
        getattr(sys.modules[module], "before_fork", lambda **_: None)(**kwargs)
    except Exception:
        return traceback.format_exc()
    ranks: dict[int, int] = {}
    try:
        for rank in range(request["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, function, kwargs, request)
            ranks[rank] = pid
        return _wait(ranks, Path(request["folder"]), time.monotonic() + request["timeout_s"], pipe)
    finally:
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _wait(ranks: dict[int, int], folder: Path, deadline: float, pipe: Connection) -> str:
    """Wait until every rank has ended. A rank is judged by the result it wrote: gloo may abort it after its work."""
    while ranks:
        for rank, pid in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del ranks[rank]
            if not Path(folder, f"{rank}.result").exists():
                time.sleep(GRACE_S)
                return _how_ended(rank, status, ranks)
        if time.monotonic() > deadline:
            return f"ranks {sorted(ranks)} were still running at the timeout"
        if pipe.poll():  # nobody asks while a request is served: the other end is closed
            return "nobody waits for the ranks any more"
        time.sleep(0.01)
    return ""


def _how_ended(rank: int, status: int, others: dict[int, int]) -> str:
    """What to blame: the rank that ended first, or one that died by a signal, whose peers may raise before."""
    codes = {rank: os.waitstatus_to_exitcode(status)}
    for other, pid in list(others.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del others[other]
            codes[other] = os.waitstatus_to_exitcode(status)
    rank = next((each for each, code in codes.items() if code < 0), rank)
    how = signal.Signals(-codes[rank]).name if codes[rank] < 0 else f"exit code {codes[rank]}"
    return f"rank {rank} ended with {how}"


def _be_rank(rank: int, function: Any, kwargs: dict[str, Any], request: dict[str, Any]) -> NoReturn:
    """In the fork: call the function, write down its result or its error, and leave without any exit handler."""
    folder = Path(request["folder"])
    code = 1
    try:
        output = os.open(folder / f"{rank}.output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()  # a rank that dies by a signal says where each thread was
        torch.set_num_threads(1)  # torch replaces its pool after a fork, and only one thread at once may make it do so
        os.environ.update(request["environment"])
        if request["num_ranks"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(request["num_ranks"]))
        _activate()
        _write(folder / f"{rank}.result", pickle.dumps(function(**kwargs)))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # a peer may still read from this rank
        code = 0
    except BaseException:
        _write(folder / f"{rank}.error", traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _activate() -> None:
    """What a launched worker has from the start: torch was imported here before MOE_ACCEL_CONFIG was set."""
    from moe_accel import cpu, worker

    if os.environ.get("MOE_ACCEL_CONFIG"):
        worker.activate()
    elif accelerate.utils.parse_flag_from_env("ACCELERATE_USE_FSDP"):
        cpu.enable_fsdp_on_cpu()  # stock accelerate on FSDP2, for comparison


def _write(file: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it exists."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    part.rename(file)


if __name__ == "__main__":
    main()
