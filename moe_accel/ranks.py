"""What the ranks of a job say to each other, and to people."""

import os
import sys
from typing import Any

import torch.distributed as dist


def gather(value: Any, group: Any = None) -> list[Any]:
    """An object of every rank of the group, or of the job. A collective call."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def tell(message: str) -> None:
    """Print a line to stderr on rank 0, which the launcher names before there is a process group."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"moe-accel: {message}", file=sys.stderr, flush=True)
