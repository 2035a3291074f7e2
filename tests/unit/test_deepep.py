"""Whether DeepEP can be used, found by what the package has, and said with the exact reason; and what connects GPUs."""

import ctypes
import importlib
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from moe_accel.dispatch import choose, deepep, topology
from moe_accel.errors import ConfigError, DependencyError
from tests import fake_deep_ep

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HOPPER = (9, 0)


@pytest.fixture
def package(monkeypatch):
    """Puts a fake `deep_ep` with these classes in place, on a GPU of this capability."""

    def put(*names, capability=HOPPER):
        monkeypatch.setitem(sys.modules, "deep_ep", fake_deep_ep.make(*names))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        deepep._package.cache_clear()

    yield put
    deepep._package.cache_clear()


def test_what_is_missing_is_named(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert deepep.problem(GPU) == "the package deep_ep is not installed"
    monkeypatch.undo()
    package("Buffer")
    assert deepep.problem(CPU) == "it needs a CUDA GPU, and this process computes on cpu"
    assert deepep.problem(GPU) is None


@pytest.mark.parametrize(
    ("error", "said"),
    {
        ImportError("libnvshmem_host.so.3: cannot open"): "ImportError: libnvshmem_host.so.3: cannot open",
        AssertionError("Duplicate NCCL runtime found"): "AssertionError: Duplicate NCCL runtime found",
        AssertionError(): "AssertionError: without a message",
    }.items(),
)
def test_a_package_that_cannot_be_imported_gives_its_own_reason(package, monkeypatch, error, said):
    package("Buffer")

    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert deepep.problem(GPU) == f"import deep_ep fails: {said}"


def test_the_implementation_is_told_by_its_class_and_can_be_asked_for(package, monkeypatch):
    package("Buffer", "ElasticBuffer")
    assert (deepep.problem(GPU), deepep.kind(), deepep.implementation()) == (None, "buffer", "deep_ep.Buffer")
    monkeypatch.setenv("MOE_ACCEL_DEEPEP", "elastic")
    assert (deepep.problem(GPU), deepep.implementation()) == (None, "deep_ep.ElasticBuffer")
    package("ElasticBuffer")
    monkeypatch.delenv("MOE_ACCEL_DEEPEP")
    assert (deepep.problem(GPU), deepep.kind()) == (None, "elastic")
    monkeypatch.setenv("MOE_ACCEL_DEEPEP", "buffer")
    assert deepep.problem(GPU) == "deep_ep has no Buffer, only ElasticBuffer"
    monkeypatch.setenv("MOE_ACCEL_DEEPEP", "v1")
    assert deepep.problem(GPU) == "MOE_ACCEL_DEEPEP='v1' must be one of buffer, elastic"


def test_a_later_package_with_other_classes_is_refused_by_them(package):
    package()
    sys.modules["deep_ep"].EPBuffer = object  # deep_ep 2.5
    assert deepep.problem(GPU) == "deep_ep has no Buffer or ElasticBuffer, only EPBuffer"


def test_an_older_gpu_needs_a_build_for_it(package, monkeypatch):
    package("Buffer", capability=(8, 0))
    said = "deep_ep is built for compute capability 9.0 and newer, and this GPU has 8.0"
    assert deepep.problem(GPU) == said
    monkeypatch.setattr(fake_deep_ep.Buffer, "is_sm90_compiled", staticmethod(lambda: False))
    assert deepep.problem(GPU) is None
    package("ElasticBuffer", capability=(8, 0))
    assert deepep.problem(GPU) == said


def test_the_accelerator_is_refused_with_the_reason_and_a_way_on(package):
    package("Buffer")
    choose.check("deepep", 2, GPU)
    with pytest.raises(ConfigError, match=r"^dispatcher=deepep cannot be used: it needs a CUDA GPU, .* on cpu\n\nhint"):
        choose.check("deepep", 2, CPU)
    package()
    with pytest.raises(DependencyError, match=r"has no Buffer or ElasticBuffer, only other names\n\nhint: disp"):
        choose.check("deepep", 2, GPU)


# ---- what fits


def fits(hosts, num_experts=128, hidden=2048, top_k=8):
    return choose.misfits(hosts, choose.Traffic(num_experts, hidden, top_k))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_on_one_host_it_has_kernels_for_2_4_and_8_ranks(package, ranks):
    package("Buffer")
    assert fits(["a"] * ranks) == []
    assert fits(["a"] * (ranks + 1)) == [f"ep_size={ranks + 1} must be one of 2, 4, 8 on one host"]


def test_between_hosts_8_neighbours_are_on_each(package):
    package("Buffer")
    assert fits(["a"] * 8 + ["b"] * 8) == []
    assert fits(["a", "b"] * 8) == ["between hosts it needs 8 neighbouring ranks of the ep group on each"]
    package("ElasticBuffer")
    assert fits(["a", "b", "b"], num_experts=129) == []


def test_every_rule_of_the_model_is_told_at_once(package):
    package("Buffer")
    assert fits(["a"] * 2, num_experts=512, hidden=9001, top_k=40) == [
        "hidden_size=9001 must be at most 8176",
        "hidden_size=9001 must be a multiple of 16",
        "num_experts / ep_size = 256 must be at most 128",
        "top-40 must be at most top-32",
    ]
    package("ElasticBuffer")
    assert fits(["a"] * 2, num_experts=512, hidden=8200, top_k=32) == []


# ---- what connects GPUs


class Nvml:
    """`libnvidia-ml.so.1` with this P2P status between GPU-0 and GPU-1."""

    def __init__(self, status):
        self.status = status

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        known = uuid in (b"GPU-0", b"GPU-1")
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 7
        return 0 if known else 6

    def nvmlDeviceGetP2PStatus(self, one, other, what, status):
        assert what == 2  # NVML_P2P_CAPS_INDEX_NVLINK of nvml.h
        ctypes.cast(status, ctypes.POINTER(ctypes.c_int))[0] = self.status
        return 0


def gpu(number, index=None, host="here"):
    return topology.Place(host, f"GPU-{number}", number if index is None else index)


def test_nvml_is_asked_first_then_torch(monkeypatch):
    monkeypatch.setattr(topology, "_nvml", lambda: Nvml(0))
    assert topology.link(gpu(0), gpu(1)) == "NVLink"
    assert topology.link(gpu(0), gpu(0)) == "one GPU"
    monkeypatch.setattr(topology, "_nvml", lambda: Nvml(5))
    assert topology.link(gpu(0), gpu(1)) == "PCIe"
    for nvml in (Nvml(0), None):  # it does not know this one; it is not there
        monkeypatch.setattr(topology, "_nvml", lambda nvml=nvml: nvml)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) == (0, 2))
        assert topology.link(gpu(0), gpu(2)) == "peer access"
        assert topology.link(gpu(2), gpu(3)) == "no peer access"
        assert topology.link(gpu(2, index=0), gpu(3, index=0)) == "unknown"


def test_the_worst_link_on_the_same_host_counts(monkeypatch):
    links = {("GPU-0", "GPU-1"): True, ("GPU-0", "GPU-2"): False}
    monkeypatch.setattr(topology, "_nvlink", lambda one, other: links[one, other])
    mine, elsewhere = gpu(0), gpu(1, host="there")
    assert topology.worst_link(mine, [mine, gpu(1)]) == "NVLink"
    assert topology.worst_link(mine, [mine, gpu(1), gpu(2)]) == "PCIe"
    assert topology.worst_link(mine, [mine, elsewhere]) == "NVLink"


# ---- what torch has to keep for this to work


def test_torch_still_destroys_groups_by_the_name_that_is_wrapped():
    assert dist.destroy_process_group.__name__ == "destroy_process_group"
    code = "from moe_accel.dispatch import deepep; import sys; print('deep_ep' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
