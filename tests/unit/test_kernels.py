"""Triton kernels without a GPU: equal to plain torch on the interpreter, and compiled for sm_90 without a spill."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from moe_accel.kernels import (
    cross_entropy,
    device,
    glu,
    rms_norm,
    squared_relu,
)
from tests.unit.compiled_kernels import BIAS, COMPILED
from tests.unit.noise import values

SHARED_BYTES = 227 * 1024  # of a block on sm_90

needs_triton = pytest.mark.skipif(not device.HAS_TRITON, reason="needs triton")


INTERPRETED_FILES = ("kernels", "loss", "router", "sinks", "gathering", "room")


@needs_triton
def test_kernels_equal_their_plain_forms_on_the_interpreter():
    files = [str(Path(__file__).with_name(f"interpreted_{name}.py")) for name in INTERPRETED_FILES]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    num_passed = re.search(r"(\d+) passed", done.stdout)
    assert num_passed is not None
    assert int(num_passed[1]) >= 25


GATES = {
    "swiglu": glu.SWIGLU,
    "gelu": glu.GELU_TANH,
    "gpt-oss": glu.Gate(1.702, limit=0.5, shift=1.0, interleaved=True),
    "clamped": glu.Gate(limit=0.5),
}
ACTIVATIONS = {
    **{
        f"{name}{of_bias}": (partial(glu.glu_torch, **given), partial(glu.glu_backward_torch, **given), 8)
        for name, gate in GATES.items()
        for of_bias, given in (("", {"gate": gate}), (" with bias", {"gate": gate, "bias": BIAS}))
    },
    "relu^2": (squared_relu.squared_relu_torch, squared_relu.squared_relu_backward_torch, 4),
}


@pytest.mark.parametrize("of_two", [False, True])
@pytest.mark.parametrize(("forward", "backward", "width"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_the_definition_of_an_activation_has_the_gradient_of_autograd(forward, backward, width, of_two):
    u, weight = _values(3, width).requires_grad_(), _values(3).requires_grad_()
    gradient = _values(3, 4)
    more, gradient_more = (torch.cos(u.detach()), torch.cos(gradient)) if of_two else (None, None)
    of_both = gradient if gradient_more is None else gradient + gradient_more
    expected = torch.autograd.grad(forward(u, weight, more), (u, weight), of_both)
    found = backward(gradient, u.detach(), weight.detach(), gradient_more, more)[:2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


_values = partial(values, dtype=torch.float64)


OPTIONS = {cross_entropy._softmax_gradient_kernel: {"num_warps": 16}}
REGISTERS, THREADS = 65_536, 2048  # of a multiprocessor of sm_90


def compiled_for_sm_90(kernel, types, constants):
    """Compiled as for tensors that begin at multiples of 16 bytes, as torch's do."""
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, each in enumerate(types) if each.startswith("*")}
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if type(kernel).__name__ == "GluonJITFunction" else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS.get(kernel, {}) | options)


def disassembled(compiled, folder, tool, *arguments):
    """What a tool that comes with Triton prints of a compiled kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    folder_of_tools = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    command = [folder_of_tools / tool, *arguments, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_triton
@pytest.mark.parametrize(("kernel", "types", "constants"), COMPILED.values(), ids=COMPILED)
def test_compiles_for_sm_90_without_spills(kernel, types, constants, tmp_path):
    compiled = compiled_for_sm_90(kernel, types, constants)
    assert compiled.metadata.shared <= SHARED_BYTES
    printed = disassembled(compiled, tmp_path, "cuobjdump", "-res-usage")
    stack = re.findall(r"STACK:(\d+)", printed)
    assert stack, printed
    assert set(stack) == {"0"}, printed


COUNTS = {"num_rows", "num_pairs", "num_kept", "num_blocks", "num_tokens", "max_tiles"}
"""Parameters that are other numbers in every step; not `num_choices`, of which kernels have two forms on purpose."""


@needs_triton
def test_no_kernel_is_compiled_anew_for_another_number_of_rows():
    found = {
        f"{kernel.__module__}.{kernel.__name__}: {parameter.name}": parameter.do_not_specialize
        for kernel, *_ in COMPILED.values()
        for parameter in kernel.params
        if parameter.name in COUNTS
    }
    assert len(found) >= 12
    assert all(found.values()), found


@needs_triton
@pytest.mark.parametrize("width", [2048, 2880, 4096, 7168])
def test_wide_rows_travel_by_16_bytes_and_all_programs_of_a_norm_are_there_at_once(width, tmp_path):
    for name, tile in zip(
        (f"rms norm of {width}", f"rms norm backward of {width}"), rms_norm.tiles(width), strict=True
    ):
        compiled = compiled_for_sm_90(*COMPILED[name])
        registers = int(re.search(r"REG:(\d+)", disassembled(compiled, tmp_path, "cuobjdump", "-res-usage"))[1])
        threads = (tile.programs or 1) * tile.num_warps * 32  # without a number they come one after the other
        assert threads <= THREADS, name
        assert -(-registers // 8) * 8 * threads <= REGISTERS, name  # given out by eight
        shared = (tile.programs or 1) * (compiled.metadata.shared + 1024)  # 1 KiB is the system's
        assert shared <= SHARED_BYTES, name
        accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\S*", disassembled(compiled, tmp_path, "nvdisasm"))
        narrow = [each for each in accesses if not each.endswith(".128")]
        assert len(accesses) - len(narrow) >= 3, name
        assert len(narrow) <= tile.stages, f"{name}: {narrow}"  # r of a row
        assert not any("16" in each for each in narrow), f"{name}: {narrow}"


@needs_triton
def test_the_labels_logit_is_read_before_threads_wait_for_each_other():
    """Behind the last time they do, in the sums over the row, a faster warp may have overwritten the logit already."""
    code = compiled_for_sm_90(*COMPILED["softmax gradient"]).asm["ttir"]
    of_one_value = re.compile(r"tt\.load %\S+, .*: !tt\.ptr<bf16>")
    assert 0 < of_one_value.search(code).start() < code.index('"tt.reduce"') < code.rindex("tt.store")


def test_rms_norm_has_the_gradient_of_finite_differences():
    x, weight = _values(3, 6).requires_grad_(), _values(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 1e-6, 1.0), (x, weight))
