"""The ranks of one job as processes of their own: started, watched, ended. What the scripts beside this file share.

Needs no torch: whoever starts ranks takes no GPU and no time.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch` exports for a plain FSDP2 config."""

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 3e-2
"""Largest relative difference of two bf16 trainings in a step: five times what bf16 makes of it (README)."""

LAUNCH = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MOE_ACCEL_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
"""Variables of a launch that this process may be part of; none reaches the ranks."""


@dataclass(frozen=True)
class Ended:
    """How a set of ranks ended.

    Attributes:
        codes: exit code of each rank; None where it had to be killed.
        outputs: what each printed, on both streams.
        seconds: from the first start to the end of the last.
    """

    codes: list[int | None]
    outputs: list[str]
    seconds: float


def python_path(*first: Path) -> str:
    """PYTHONPATH of a rank: what comes first, this checkout, and this process's own."""
    return os.pathsep.join([*map(str, first), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def check_gpus(needed: int, device: str) -> None:
    """Exit with a message where ranks on `cuda` lack GPUs. Imports torch, as nothing else here does."""
    import torch

    if device == "cuda" and (found := torch.cuda.device_count()) < needed:
        sys.exit(f"--gpus {needed}, but {found} are here; --device cpu runs over gloo")


PORTS = 15_000, 32_000
"""Below those that systems give out by themselves: one of these may be taken before the ranks have it."""


def free_port() -> int:
    """A port that nobody listens on now, and nobody is given by chance."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port of {PORTS} is free")


def run_ranks(
    command: Sequence[str], num_ranks: int, environment: Mapping[str, str], folder: Path, limit_s: float
) -> Ended:
    """Run `command` as `num_ranks` ranks of one host, and wait for their end; one that fails ends all in 5 s.

    Args:
        command: of each rank.
        num_ranks: 1 is a process that knows of no others.
        environment: variables besides those of this process and those that say which rank it is.
        folder: for what they print, `RANK.txt`.
        limit_s: seconds after which all are killed.
    """
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH)}
    ranks, files, start = [], [Path(folder, f"{rank}.txt") for rank in range(num_ranks)], time.monotonic()
    try:
        for rank, file in enumerate(files):
            env = clean | dict(environment)
            if num_ranks > 1:
                env |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
                env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the processors
            with file.open("w") as output:
                ranks.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
        while time.monotonic() - start < limit_s and any(each.poll() is None for each in ranks):
            if any(each.poll() for each in ranks):  # the others wait for it
                time.sleep(5)
                break
            time.sleep(0.2)
        codes = [each.poll() for each in ranks]
    finally:
        for each in ranks:
            with contextlib.suppress(ProcessLookupError):
                each.kill()
            each.wait()
    outputs = [file.read_text(errors="replace") for file in files]
    return Ended(codes, outputs, round(time.monotonic() - start, 1))
