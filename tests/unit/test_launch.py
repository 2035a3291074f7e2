"""What a launch keeps: a kernel is compiled anew where Triton would, and otherwise started as it was compiled."""

from types import SimpleNamespace

import pytest
import torch

from moe_accel.kernels import device, rms_norm

pytestmark = pytest.mark.skipif(not device.HAS_TRITON, reason="needs triton")
MEMORY = torch.zeros(64, dtype=torch.float64)  # begins at a multiple of 64 bytes
STREAM = 7
NOT_THERE = 99  # a device that no other test's kernels are compiled for


class Kernel:
    """Stands for a Triton kernel of two tensors, a number and a constant: counts what it is asked for."""

    def __init__(self):
        self.arg_names = ["x", "y", "number", "WIDTH"]
        self.num_compiled, self.runs = 0, []

    def __getitem__(self, grid):
        runs = self.runs

        def compile_and_run(*args, **constants):
            self.num_compiled += 1
            run = lambda *given: runs.append(given)  # noqa: E731
            return SimpleNamespace(function="function", packed_metadata="metadata", run=run)

        return compile_and_run


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(device, "_compiled", {})
    kernel = Kernel()

    def launch(x, y, number, of=kernel, on=0, **constants):
        device._launch_compiled(of, (3,), on, (x, y, number), {"WIDTH": 8, "num_warps": 4} | constants)
        return kernel

    return launch


def at(byte, dtype=torch.float32):
    return MEMORY.view(torch.uint8)[byte : byte + 8].view(dtype)


def test_the_second_launch_runs_what_the_first_compiled_with_its_own_arguments(launched):
    launched(at(0), at(16), 33)
    kernel = launched(at(64), at(32), 17)
    assert kernel.num_compiled == 1
    addresses = MEMORY.data_ptr() + 64, MEMORY.data_ptr() + 32
    assert kernel.runs == [(3, 1, 1, STREAM, "function", "metadata", None, None, None, *addresses, 17, 8)]


OTHERS = {
    "address": lambda launch: launch(at(8), at(16), 33),
    "dtype": lambda launch: launch(at(0, torch.int32), at(16), 33),
    "number-that-16-divides": lambda launch: launch(at(0), at(16), 32),
    "number-one": lambda launch: launch(at(0), at(16), 1),
    "number-of-64-bits": lambda launch: launch(at(0), at(16), 2**31 + 1),
    "no-number": lambda launch: launch(at(0), at(16), None),
    "constant": lambda launch: launch(at(0), at(16), 33, WIDTH=16),
    "warps": lambda launch: launch(at(0), at(16), 33, num_warps=8),
    "device": lambda launch: launch(at(0), at(16), 33, on=1),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_arguments_of_another_kind_are_compiled_for(other, launched):
    launched(at(0), at(16), 17)
    kernel = other(launched)
    assert kernel.num_compiled == 2
    assert not kernel.runs


def test_another_kernel_is_never_taken_for_one_that_is_gone(launched):
    for _ in range(20):  # memory, and with it the id, of a freed object is soon that of the next
        kernel = Kernel()
        launched(at(0), at(16), 33, of=kernel)
        assert (kernel.num_compiled, kernel.runs) == (1, [])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_triton_itself_launches_under_a_profiler(launched, monkeypatch, hook):
    launched(at(0), at(16), 33)
    monkeypatch.setattr(getattr(device.triton.knobs.runtime, hook), "calls", [lambda *_: None])
    kernel = launched(at(0), at(16), 33)
    assert kernel.num_compiled == 2
    assert not kernel.runs


@pytest.fixture
def starts(monkeypatch):
    """What is started, each with all its arguments, on a machine that Triton takes for one with an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    started = []
    properties = {"max_shared_mem": 227 * 1024}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda *_: ("module", "function", 64, 0, 1024),
    )
    machine = SimpleNamespace(
        get_current_device=lambda: NOT_THERE,
        get_current_stream=lambda device: STREAM,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *given: started.append(given),
        utils=utils,
    )
    monkeypatch.setattr(driver, "_active", machine)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(device, "_compiled", {})
    return started


@pytest.mark.skipif(not device.IS_TRITON_36, reason="of Triton 3.6")
def test_a_real_kernel_is_started_with_the_arguments_that_triton_gives_it(starts):
    x, sums = torch.zeros(3, 40, dtype=torch.bfloat16), torch.zeros(3, 40)
    constants = {"OF_WEIGHT": True, "offset": 0.0} | rms_norm._constants(rms_norm.Tile(1, 4, 1, 1), 40)
    for num_rows in (1, 3, 16, 3):
        args = x, x, x[0], sums, x, sums, num_rows
        for _ in range(2):  # by Triton, if it is new, and past it
            device._launch_compiled(rms_norm._backward_kernel, (3,), NOT_THERE, args, constants)
        rms_norm._backward_kernel[(3,)](*args, **constants)
    assert len(device._compiled) == 3
    for past, by_triton in zip(starts[1::3], starts[2::3], strict=True):
        assert past[6:9] == (None, None, None)  # metadata for hooks, and no hooks
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in by_triton[9:]]
        assert (*past[:6], *past[9:]) == (*by_triton[:6], *values)
        assert isinstance(past[9], int)
