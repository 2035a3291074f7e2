"""Where the ranks of a group are, and what connects their GPUs: asked of the driver, never assumed from a name.

NVLink is asked of NVML, which every driver brings along (`libnvidia-ml.so.1`). Without it torch says whether one GPU
may read another's memory, which holds for PCIe, too.
"""

import ctypes
import functools
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_accel.ranks import gather

LINKS = ("one GPU", "no peer access", "PCIe", "unknown", "peer access", "NVLink")
"""Between two GPUs of a host, the worst first."""


@dataclass(frozen=True)
class Place:
    """Of one rank.

    Attributes:
        host: name of the machine.
        gpu: UUID of its GPU, as NVML writes it.
        index: of the GPU in its own process.
    """

    host: str
    gpu: str
    index: int


def places(group: Any, device: torch.device) -> list[Place]:
    """Of every rank of the group. A collective call."""
    index = torch.cuda.current_device() if device.index is None else device.index
    mine = Place(socket.gethostname(), f"GPU-{torch.cuda.get_device_properties(index).uuid}", index)
    return gather(mine, group)


def worst_link(mine: Place, others: Sequence[Place]) -> str:
    """The worst of what connects a GPU with the others on its host, a word of `LINKS`; NVLink where it is alone."""
    found = [link(mine, other) for other in others if other.host == mine.host and other is not mine]
    return min(found, key=LINKS.index, default="NVLink")


def link(one: Place, other: Place) -> str:
    """What connects two GPUs of this host, a word of `LINKS`."""
    if one.gpu == other.gpu:
        return "one GPU"
    told = _nvlink(one.gpu, other.gpu)
    if told is not None:
        return "NVLink" if told else "PCIe"
    if one.index == other.index:  # each process sees only its own GPU, so torch cannot be asked about the other
        return "unknown"
    return "peer access" if torch.cuda.can_device_access_peer(one.index, other.index) else "no peer access"


def _nvlink(one: str, other: str) -> bool | None:
    """Whether NVML says that NVLink connects two GPUs, given by UUID; None where it cannot be asked."""
    nvml = _nvml()
    if nvml is None:
        return None
    handles = [ctypes.c_void_p(), ctypes.c_void_p()]
    for uuid, handle in zip((one, other), handles, strict=True):
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
    status = ctypes.c_int(-1)
    if nvml.nvmlDeviceGetP2PStatus(*handles, 2, ctypes.byref(status)):  # 2: NVML_P2P_CAPS_INDEX_NVLINK
        return None
    return status.value == 0  # NVML_P2P_STATUS_OK


@functools.cache
def _nvml() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
