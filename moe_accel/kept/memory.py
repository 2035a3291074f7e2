"""What `kept_layers: auto` reads of a device's memory: counters of torch's allocator, on the host, without waiting."""

from typing import Protocol

import torch

MARGIN = 0.06
"""Share of a device's memory that stays free at the peak: for blocks that fit nothing (reserved, not allocated), for
buffers of NCCL and other libraries that come later, and for the one layer that is kept to be measured."""


class Memory(Protocol):
    """A device's memory, in bytes."""

    total: int

    def allocated(self) -> int:
        """Of tensors, now."""
        ...

    def peak(self) -> int:
        """The most that tensors took since `forget_peak`."""
        ...

    def forget_peak(self) -> None:
        """Let the peak be what is allocated now."""
        ...

    def available(self) -> int:
        """What tensors could take: without what others and libraries hold."""
        ...

    def num_retries(self) -> int:
        """How often the allocator found nothing and gave back what it had cached, so far."""
        ...


class DeviceMemory:
    """That of a CUDA device, by its allocator and its driver."""

    def __init__(self, device: torch.device) -> None:
        # some of torch.cuda's functions take no "cuda" without an index
        self.device = torch.cuda.current_device() if device.index is None else device.index
        self.total = torch.cuda.mem_get_info(self.device)[1]

    def allocated(self) -> int:
        """Of tensors, now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most that tensors took since `forget_peak`, or since anybody else reset the peak."""
        return torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        """Let the peak be what is allocated now."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def available(self) -> int:
        """What is free and what the allocator has; less where the process is held to a share of the device."""
        free, total = torch.cuda.mem_get_info(self.device)
        share = torch.cuda.get_per_process_memory_fraction(self.device)
        return min(free + torch.cuda.memory_reserved(self.device), int(share * total))

    def num_retries(self) -> int:
        """How often the allocator found nothing and gave back what it had cached, so far."""
        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)


def memory_of(device: torch.device) -> Memory | None:
    """The memory of a device; None where it can't be read."""
    return DeviceMemory(device) if device.type == "cuda" else None
