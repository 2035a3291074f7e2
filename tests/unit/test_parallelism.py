"""MoEConfig, the object accelerate carries: its errors in full, its sizes, and that it travels."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from moe_accel import MoEConfig, parallelism
from moe_accel.errors import ConfigError
from moe_accel.mesh import build_sparse_mesh


@pytest.fixture(autouse=True)
def _no_sizes_from_the_environment(monkeypatch):
    for axis in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP"):
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{axis}_SIZE", raising=False)


@pytest.fixture
def job(monkeypatch):
    """What the job looks like to accelerate; change it in the test. No mesh is built: that takes the ranks."""
    state = SimpleNamespace(
        distributed_type=DistributedType.FSDP, num_processes=8, fsdp_plugin=SimpleNamespace(fsdp_version=2)
    )
    monkeypatch.setattr(parallelism, "AcceleratorState", lambda: state)
    monkeypatch.setattr(ParallelismConfig, "get_device_mesh", lambda self, device_type=None: "dense")
    monkeypatch.setattr(parallelism, "build_sparse_mesh", lambda *sizes: sizes)
    return state


@pytest.fixture
def accelerate_as_it_was(monkeypatch):
    """Accelerate's singletons are new in the test and gone after it, and so are the plugin's hooks on its class."""
    monkeypatch.setattr(Accelerator, "prepare", Accelerator.prepare)
    monkeypatch.setattr(Accelerator, "prepare_model", Accelerator.prepare_model)

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


# ---- values


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        MoEConfig(ep_size=0, dispatcher="alltoal", kernels="atuo", dp_replicate_size=-1)
    assert str(error.value) == (
        "MoEConfig: 4 problems\n"
        "  - ep_size=0 must be at least 1\n"
        "  - dp_replicate_size=-1 must be at least 1\n"
        "  - dispatcher='alltoal' must be one of auto, alltoall, deepep (did you mean 'alltoall'?)\n"
        "  - kernels='atuo' must be one of auto, reference, fused, te (did you mean 'auto'?)"
    )


@pytest.mark.parametrize("value", ["2", 2.0, True, None])
def test_an_ep_size_that_is_no_whole_number_is_refused(value):
    with pytest.raises(ConfigError) as error:
        MoEConfig(ep_size=value)
    assert str(error.value) == f"MoEConfig: ep_size={value!r} must be a whole number"


# ---- the job


CONFIG_LINES = "in the accelerate config write\n"
WITHOUT_CONFIG = (
    "and without one, as with torchrun, let MOE_ACCEL_CONFIG be the path of such a file, or export\n"
    "ACCELERATE_USE_FSDP=true FSDP_VERSION=2"
)
REFUSED = {
    "no-fsdp": (
        {"distributed_type": DistributedType.MULTI_GPU},
        {"ep_size": 2},
        "ep_size=2 needs distributed_type FSDP, not MULTI_GPU (num_processes=8)",
        f"{CONFIG_LINES}distributed_type: FSDP\nfsdp_config: {{fsdp_version: 2}}\n{WITHOUT_CONFIG}",
    ),
    "one-process": (
        {"distributed_type": DistributedType.NO, "num_processes": 1},
        {"ep_size": 4},
        "ep_size=4 needs distributed_type FSDP, not NO (num_processes=1)",
        f"{CONFIG_LINES}distributed_type: FSDP\nfsdp_config: {{fsdp_version: 2}}\n{WITHOUT_CONFIG}",
    ),
    "fsdp-version-1": (
        {"fsdp_plugin": SimpleNamespace(fsdp_version=1)},
        {"ep_size": 2},
        "ep_size=2 needs FSDP version 2, not 1",
        f"{CONFIG_LINES}fsdp_config: {{fsdp_version: 2}}",
    ),
    "tensor-parallelism": (
        {},
        {"ep_size": 2, "tp_size": 2},
        "ep_size=2 cannot be combined with tp_size=2",
        "leave tensor, context and sequence parallelism at 1",
    ),
    "tensor-and-context-parallelism": (
        {},
        {"ep_size": 2, "tp_size": 2, "cp_size": 2},
        "ep_size=2 cannot be combined with tp_size=2, cp_size=2",
        "leave tensor, context and sequence parallelism at 1",
    ),
    "ep_size-does-not-divide": (
        {},
        {"ep_size": 3},
        "ep_size=3 must divide num_processes=8",
        "ep_size: any of [1, 2, 4, 8]",
    ),
    "ep_size-over-a-replica": (
        {},
        {"ep_size": 4, "dp_replicate_size": 4},
        "ep_size=4 must divide the 2 ranks that FSDP shards over (num_processes=8 / 4)",
        "ep_size: any of [1, 2]",
    ),
    "replicas-do-not-divide": (
        {},
        {"ep_size": 1, "dp_replicate_size": 3},
        "dp_replicate_size=3 must divide the 8 data-parallel ranks",
        "any of [1, 2, 4, 8]",
    ),
    "dp_shard_size-too-small": (
        {},
        {"ep_size": 2, "dp_shard_size": 4},
        "dp_shard_size=4 does not fit num_processes=8 with dp_replicate_size=1",
        "leave it out, or write dp_shard_size: 8",
    ),
    "dp_shard_size-of-1": (
        {},
        {"ep_size": 2, "dp_shard_size": 1},
        "dp_shard_size=1 does not fit num_processes=8 with dp_replicate_size=1",
        "leave it out, or write dp_shard_size: 8",
    ),
    "dp_shard_size-too-large": (
        {},
        {"ep_size": 2, "dp_shard_size": 8, "dp_replicate_size": 2},
        "dp_shard_size=8 does not fit num_processes=8 with dp_replicate_size=2",
        "leave it out, or write dp_shard_size: 4",
    ),
}


@pytest.mark.parametrize(("of_job", "of_config", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_job_is_refused_with_the_remedy(job, of_job, of_config, message, hint):
    vars(job).update(of_job)
    with pytest.raises(ConfigError) as error:
        MoEConfig(**of_config).get_device_mesh("cuda")
    assert (error.value.message, error.value.hint) == (message, hint)


def test_accelerates_own_section_gives_sizes_too_and_wrong_ones_are_refused_alike(job, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^dp_shard_size=2 does not fit num_processes=8 with dp_replicate_size=1\n"):
        MoEConfig(ep_size=2).get_device_mesh("cuda")


FITTING = {
    "plain": ({"ep_size": 4}, 8, (1, 8, 4)),
    "all-ranks": ({"ep_size": 8}, 8, (1, 8, 8)),
    "replicas": ({"ep_size": 2, "dp_replicate_size": 2}, 8, (2, 4, 2)),
    "dp_shard_size-given": ({"ep_size": 2, "dp_replicate_size": 4, "dp_shard_size": 2}, 8, (4, 2, 2)),
    "six-ranks": ({"ep_size": 3}, 6, (1, 6, 3)),
}


@pytest.mark.parametrize(("sizes", "ranks", "mesh"), FITTING.values(), ids=FITTING)
def test_what_fits_settles_dp_shard_size_and_the_experts_mesh(job, sizes, ranks, mesh):
    job.num_processes = ranks
    config = MoEConfig(**sizes)
    assert config.get_device_mesh("cuda") == "dense"
    assert config.sparse_mesh == ("cuda", *mesh)
    assert (config.dp_replicate_size, config.dp_shard_size, config.ep_size) == mesh
    assert config.total_size == ranks


def test_ep_size_1_has_no_experts_mesh_and_leaves_a_job_without_fsdp_to_accelerate(job):
    job.distributed_type = DistributedType.MULTI_GPU
    config = MoEConfig()
    config.get_device_mesh("cuda")
    assert config.sparse_mesh is None
    assert config.dp_shard_size == 1


# ---- what accelerate has to keep for this to work


def test_accelerate_still_builds_the_mesh_first_and_then_validates_with_the_live_accelerator(
    monkeypatch, accelerate_as_it_was
):
    calls = []
    monkeypatch.setattr(MoEConfig, "get_device_mesh", lambda self, device_type: calls.append(device_type))
    monkeypatch.setattr(MoEConfig, "_validate_accelerator", lambda self, accelerator: calls.append(accelerator))
    config = MoEConfig()
    accelerator = Accelerator(parallelism_config=config)
    assert calls == ["cpu", accelerator]
    assert accelerator.parallelism_config is config


def test_accelerate_still_has_what_is_overridden_and_used():
    def parameters(method):
        return list(inspect.signature(method).parameters)

    assert parameters(ParallelismConfig.get_device_mesh) == ["self", "device_type"]
    assert parameters(ParallelismConfig._validate_accelerator) == ["self", "accelerator"]
    assert parameters(ParallelismConfig._set_size) == ["self", "parallelism", "size"]
    assert ParallelismConfig()._sizes.keys() == {"dp_replicate", "dp_shard", "tp", "cp", "sp"}
    assert not hasattr(ParallelismConfig, "sparse_mesh")
    assert not hasattr(ParallelismConfig, "ep_size")


# ---- it travels


def by_pickle(config):
    return pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_has_the_sizes_but_no_mesh_and_fits_another_job(job, copied):
    config = MoEConfig(ep_size=2, kernels="reference")
    config.get_device_mesh("cuda")
    config.device_mesh = "dense"
    other = copied(config)
    assert other == config
    assert (other.device_mesh, other.sparse_mesh) == (None, None)
    job.num_processes = 16
    other.get_device_mesh("cuda")
    assert other.sparse_mesh == ("cuda", 1, 16, 2)
    assert config.sparse_mesh == ("cuda", 1, 8, 2)


@pytest.fixture
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_arguments_write_it_down_also_when_its_meshes_are_built(
    tmp_path, accelerate_as_it_was, one_rank_group
):
    """Trackers ask for `to_dict` and `to_json_string` when training begins."""
    config = MoEConfig(ep_size=2, kernels="reference", dp_replicate_size=2)
    config.device_mesh = config.sparse_mesh = build_sparse_mesh("cpu", 1, 1, 1)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", parallelism_config=config)
    assert arguments.parallelism_config is config
    assert by_pickle(arguments).parallelism_config == config
    for told in (arguments.to_dict(), json.loads(arguments.to_json_string())):
        written = told["parallelism_config"]
        assert MoEConfig(**written) == config
        assert (written["ep_size"], written["kernels"], written["dp_replicate_size"]) == (2, "reference", 2)
    assert "'kernels': 'reference'" in arguments.to_sanitized_dict()["parallelism_config"]
