"""The loading cases of `several.py`, on one rank: time and host memory to read a checkpoint, and time to save one."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_accel.bench.measure import GIB
from moe_accel.bench.shapes import SHAPES
from tests.dist.load_memory import peak_bytes, write_checkpoint
from tests.gpu.several_rank import (
    Job,
    accelerator_of,
    check_arm,
    distributed_config,
    gathered,
    own_device,
    synchronize,
)


def write(job: Job) -> Iterator[dict[str, Any]]:
    """The checkpoint, in the hub's layout."""
    start = time.perf_counter()
    sizes = {"tie_word_embeddings": False} | SHAPES[job.shape].values
    num_bytes = write_checkpoint(Path(job.checkpoint), job.layers, sizes, 4 << 30)
    yield {"bytes": num_bytes, "write_s": time.perf_counter() - start}


def load_and_save(job: Job) -> Iterator[dict[str, Any]]:
    """Seconds until all ranks have their shards, with the host memory that took; then until all is on the disk.

    Instead of losses, sums over all weights are compared.
    """
    device = own_device(job)
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401 so that its import is not timed

    check_arm(job)
    native, accelerator, more = job.arm == "native_ep", None, {}
    if native:
        config = distributed_config(job)
        more["distributed_config"] = config
        from transformers.distributed.utils import initialize_distributed_mesh

        initialize_distributed_mesh(config)  # so that NCCL's start is not timed, as in the other arms
    else:
        accelerator = accelerator_of(job)
    torch.zeros(1, device=device)
    gathered(None)
    before, start = peak_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16, **more)
    if accelerator is not None:
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    synchronize(device)
    gathered(None)
    load_s = time.perf_counter() - start
    host = max(gathered(peak_bytes() - before))
    whole = [each.numel() * each.element_size() for each in model.parameters()]
    part = {"routing": "load", "bytes": sum(whole), "load_s": load_s, "host_gib": host / GIB}
    part["losses"] = checksums(model)

    out = Path(job.checkpoint).with_name("saved")
    gathered(None)
    start = time.perf_counter()
    if accelerator is None:
        model.save_pretrained(out, max_shard_size="4GB")
    elif job.arm.startswith("stock"):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            model.save_pretrained(out, state_dict=weights, max_shard_size="4GB")
    else:
        accelerator.save_model(model, out, max_shard_size="4GB")
    os.sync()
    gathered(None)
    part["save_s"] = time.perf_counter() - start
    if (saved := bytes_in(out)) != sum(whole):
        raise RuntimeError(f"{saved} bytes of weights were saved of {sum(whole)}")
    yield part


def bytes_in(folder: Path) -> int:
    """Of weights in a folder's safetensors files, without their headers."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            found += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    return found


def checksums(model: nn.Module) -> list[float]:
    """Sum of squares, and of absolutes, over the weights that all ranks hold together."""
    sums = [0.0, 0.0]
    for parameter in model.parameters():
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().double()
        sums[0] += local.square().sum().item()
        sums[1] += local.abs().sum().item()
    return [sum(values) for values in zip(*gathered(sums), strict=True)]
