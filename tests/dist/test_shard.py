"""Which experts are given to FSDP2: those that ranks share, and those it has to keep elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from moe_accel import experts, shard
from tests.dist import training
from tests.dist.ranks import run_ranks, with_moe_config
from tests.dist.training import Job
from tests.families import build_tiny, experts_modules

JOB = Job()


def before_fork(**_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(JOB)


def experts_as_prepared(precision: str) -> list[tuple[bool, torch.dtype | None, tuple[str, ...], int]]:
    """Of each layer: whether FSDP2 has its experts, the dtype they are cast to without it, and of its up projection the
    mesh and how many of the experts are here."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule

    accelerator = Accelerator(mixed_precision=precision)
    model = training.initial_model(JOB)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    found = []
    for module in model.modules():
        if experts.is_decorated(module):
            weight: Any = module.gate_up_proj
            assert weight.dtype == torch.float32
            assert weight.shape[0] == module.num_experts
            names = weight.device_mesh.mesh_dim_names
            here = weight.to_local().shape[0]
            found.append((isinstance(module, FSDPModule), experts.settings_of(module).dtype, names, here))
    return found


MESH = ("efsdp", "ep")
CASES = {
    "fp32": (2, "no", "fused", (False, None, MESH, 4)),
    "bf16": (2, "bf16", "fused", (False, torch.bfloat16, MESH, 4)),
    "bf16, one after the other": (2, "bf16", "reference", (True, None, MESH, 4)),
    "shared": (4, "bf16", "fused", (True, None, MESH, 2)),
}


@pytest.mark.parametrize(("num_ranks", "precision", "kernels", "expected"), CASES.values(), ids=CASES)
def test_experts_that_a_rank_has_alone_are_left_as_they_are(num_ranks, precision, kernels, expected):
    environment = with_moe_config(ep_size=2, kernels=kernels)
    found = run_ranks(experts_as_prepared, num_ranks, environment, precision=precision)
    assert found == [[expected] * len(found[0])] * num_ranks
    assert found[0]


@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(param_dtype=torch.bfloat16)], ids=["fp32", "bf16"])
def test_experts_that_are_offloaded_are_fsdps_to_bring(policy):
    """Offloading needs a GPU: torch pins the memory."""
    module = next(module for _, module in experts_modules(build_tiny("qwen3_moe", torch.float32)))
    experts.install(module, experts.Settings())
    for offload, stays in ((CPUOffloadPolicy(), False), (OffloadPolicy(), True), (None, True)):
        plugin = SimpleNamespace(cpu_offload=offload, mixed_precision_policy=policy)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
        assert shard._can_stay(module, list(module.named_parameters()), accelerator) is stays


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_experts_in_the_dtype_of_mixed_precision_take_tokens_in_it(kernels):
    """FSDP2 casts what a module is given."""
    module = next(module for _, module in experts_modules(build_tiny("qwen3_moe", torch.bfloat16)))
    experts.install(module, experts.Settings(kernels))
    plugin = SimpleNamespace(cpu_offload=None, mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
    assert shard._can_stay(module, list(module.named_parameters()), accelerator)
    assert experts.settings_of(module).dtype == torch.bfloat16
