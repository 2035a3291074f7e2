"""FSDP2 on a machine without any accelerator device, over gloo: for the demo, for tests, for a first try on a laptop.

accelerate 1.15 never enters FSDP on a CPU: `PartialState` gives a rank there the type `NO` (or `MULTI_CPU`), and
`AcceleratorState` turns only the GPU-like types into `FSDP`. FSDP2 itself works there. So a `moe_config` launch that
asks for FSDP where no device exists tells accelerate "several GPUs, backend gloo" and "the device is the CPU".
"""

import os
from typing import Any

from moe_accel.hooks import wrap


def enable_fsdp_on_cpu() -> bool:
    """Patch two methods of `accelerate.PartialState` where no accelerator device is available.

    Each launched rank that asks for FSDP (ACCELERATE_USE_FSDP) and not for `cpu=True` then runs on gloo; every other
    process keeps accelerate's own behaviour. Returns whether the patch is in place.
    """
    import torch
    from accelerate.state import PartialState

    if torch.accelerator.is_available():
        return False
    wrap(PartialState, "_prepare_backend", _gloo_for_fsdp)
    wrap(PartialState, "set_device", _cpu_for_gloo)
    return True


def _gloo_for_fsdp(original: Any) -> Any:
    def prepare_backend(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        from accelerate.utils import DistributedType, parse_flag_from_env

        launched = int(os.environ.get("LOCAL_RANK", "-1")) != -1
        if launched and not cpu and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return "gloo", DistributedType.MULTI_GPU
        return original(self, cpu, *args, **kwargs)

    return prepare_backend


def _cpu_for_gloo(original: Any) -> Any:
    def set_device(self: Any) -> None:
        import torch
        from accelerate.utils import DistributedType

        if self.device is None and self.distributed_type == DistributedType.MULTI_GPU:
            self.device = torch.device("cpu")
        original(self)

    return set_device
