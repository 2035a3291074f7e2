"""Whether code runs in a backward pass."""

import torch


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, where the only forwards are recomputed ones."""
    return torch._C._current_graph_task_id() != -1
