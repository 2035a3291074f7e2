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
    adam,
    cross_entropy,
    device,
    gathering,
    glu,
    gluon,
    gluon_outer,
    message,
    rms_norm,
    rope,
    router,
    rows,
    sinks,
    sort,
    squared_relu,
)
from tests.unit.noise import values
from tests.unit.router_rules import RULES

SHARED_BYTES = 227 * 1024  # of a block on sm_90

needs_triton = pytest.mark.skipif(not device.HAS_TRITON, reason="needs triton")


INTERPRETED_FILES = ("kernels", "loss", "router", "sinks", "gathering")


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
BIAS = glu.ExpertBias(torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8), torch.tensor([1, 0, 1]))
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


COMPILED_GATES = {
    "": (None, None, glu.SWIGLU, 768),
    " of two": (torch.empty(0), None, glu.SWIGLU, 768),
    " of gpt-oss": (None, BIAS, glu.Gate(1.702, limit=7.0, shift=1.0, interleaved=True), 2880),
    " of gpt-oss, of two": (torch.empty(0), BIAS, glu.Gate(1.702, limit=7.0, shift=1.0, interleaved=True), 2880),
    " of gelu": (None, None, glu.GELU_TANH, 704),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUTERS = [
    ("qwen3", "bf16"),
    ("qwen3", "fp32"),
    ("olmoe", "bf16"),
    ("mixtral", "bf16"),
    ("deepseek-v3", "fp32"),
    ("nemotron", "fp32"),
    ("most", "fp32"),
]
COMPILED = {
    **{
        f"sum{name}": (
            rows._sum_kernel,
            ["*bf16", "*bf16", "*i64", "*i64", "*bf16", "i32", "i32", "i32", "i32"],
            {"HAS_MORE": more, "COPIES": 8, "COLUMNS": 1024},
        )
        for name, more in (("", False), (" of two", True))
    },
    "gather": (
        rows._gather_kernel,
        ["*bf16", "*i64", "*i64", "*bf16", "i32", "i32", "i32", "i32", "i32"],
        {"COPIES": 8, "COLUMNS": 1024},
    ),
    **{
        f"{name} of {padded} experts": (kernel, types, {"EXPERTS": padded} | constants)
        for padded in (128, 2048)
        for name, kernel, types, constants in (
            ("count", sort._count_kernel, ["*i64", "*i32", "i32", "i32"], {"BLOCK": sort.BLOCK}),
            (
                "scan",
                sort._scan_kernel,
                ["*i32", "*i32", "i32"],
                {"BLOCKS": sort.SCANNED_BLOCKS, "TILE": sort.SCANNED_EXPERTS},
            ),
            *(
                (
                    f"place{dropping}",
                    sort._place_kernel,
                    ["*i64", "*i32", "*i32", "*i64", "*i16", "*i32", "*i64", "*i64", "*i64"] + ["i32"] * 4,
                    {"DROPS": drops, "BLOCK": sort.BLOCK, "CHUNK": sort.CHUNK},
                )
                for dropping, drops in (("", False), (" or drop", True))
            ),
        )
    },
    **{
        f"router{way} of {name} in {dtype}": (kernel, types, {**more, **router.constants(*RULES[name][:2])})
        for name, dtype in ROUTERS
        for way, kernel, types, more in (
            (
                "",
                router._forward_kernel,
                [f"*{dtype}", "*fp32", f"*{dtype}", "*i64", "*fp32", "i32"],
                router.of_choice(RULES[name][0], DTYPES[dtype], RULES[name][2]),
            ),
            (" backward", router._backward_kernel, [f"*{dtype}", "*fp32", "*i64", f"*{dtype}", f"*{dtype}", "i32"], {}),
        )
    },
    "count of rows to send": (
        message._count_kernel,
        ["*i64", "*i32", "*i32", "i32", "i32", "i32"],
        {"TOP_K": 8, "RANKS": 32, "CHOICES": message.CHOICES},
    ),
    **{
        f"tail of a row{more}": (
            message._write_kernel,
            ["*i32", "*i64", "*i64", "*i16", "*i32", "i32", "i32", "i32", "i32", "i32", "i32"],
            {"HAS_CHOICES": has_choices, "PADDED": 8, "ROWS": message.ROWS},
        )
        for more, has_choices in (("", False), (" with choices", True))
    },
    "softmax gradient": (
        cross_entropy._softmax_gradient_kernel,
        ["*bf16", "*i64", "*fp32", "*fp32"],
        {"width": 151_936, "COLUMNS": 8192},
    ),
    "scaling a gradient": (
        cross_entropy._scale_kernel,
        ["*bf16", "*fp32", "i64"],
        {"ELEMENTS": cross_entropy.SCALED, "num_warps": 8},
    ),
    **{
        f"rms norm{direction} of {width}": (kernel, types, given | rms_norm._constants(tile, width))
        for width in (128, 2048, 2880, 4096, 7168)
        for tile, (direction, kernel, types, given) in zip(
            rms_norm.tiles(width),
            (
                (
                    "",
                    rms_norm._forward_kernel,
                    ["*bf16", "*bf16", "*bf16", "*fp32", "i32"],
                    {"eps": 1e-6, "offset": 0.0},
                ),
                (
                    " backward",
                    rms_norm._backward_kernel,
                    ["*bf16", "*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "i32"],
                    {"OF_WEIGHT": True, "offset": 0.0},
                ),
            ),
            strict=True,
        )
    },
    "rms norm backward, frozen": (
        rms_norm._backward_kernel,
        ["*bf16", "*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "i32"],
        {"OF_WEIGHT": False, "offset": 0.0} | rms_norm._constants(rms_norm.tiles(2048)[1], 2048),
    ),
    "rms norm's sum": (
        rms_norm._sum_kernel,
        ["*fp32", "*bf16", "i32"],
        {"width": 2880, "ROWS": rms_norm.SUMMED_ROWS, "COLUMNS": rms_norm.SUMMED_COLUMNS, "num_warps": 8},
    ),
    **{
        f"rotation by {angles} angles": (
            rope._rotate_kernel,
            ["*bf16"] * 4 + ["i64"] * 9,
            {"BACKWARD": True, "num_heads": 32, "half": 64, "angles": angles, "HEADS": 32, "HALF": 64},
        )
        for angles in (128, 64)
    },
    "sinks": (
        sinks._add_kernel,
        ["*bf16", "*fp32", "*bf16", "*bf16", "*fp32"] + ["i32"] * 5,
        sinks._constants(64, 64),
    ),
    "sinks backward": (
        sinks._gradient_kernel,
        ["*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "i32", "i32", "i32"],
        sinks._constants(64, 192),
    ),
    **{
        f"glu{name}": (
            glu._forward_kernel,
            ["*bf16", "*bf16", "*bf16", "*i16", "*fp32", "*bf16"],
            {**glu._constants(more, bias, gate), "tail": 16, "inner": inner, "COLUMNS": glu.COLUMNS},
        )
        for name, (more, bias, gate, inner) in COMPILED_GATES.items()
    },
    **{
        f"glu backward{name}": (
            glu._backward_kernel,
            ["*bf16", "*bf16", "*bf16", "*bf16", "*bf16", "*i16", "*fp32", "*bf16", "*fp32", "*bf16"],
            {
                "HAS_GRADIENT_MORE": more is not None,
                **glu._constants(more, bias, gate),
                "tail": 0,
                "inner": inner,
                "COLUMNS": glu.COLUMNS,
            },
        )
        for name, (more, bias, gate, inner) in COMPILED_GATES.items()
    },
    **{
        f"squared relu{name}": (
            squared_relu._forward_kernel,
            ["*bf16", "*bf16", "*fp32", "*bf16"],
            {"HAS_MORE": more, "tail": 0, "inner": 1856, "COLUMNS": 1024},
        )
        for name, more in (("", False), (" of two", True))
    },
    **{
        f"squared relu backward{name}": (
            squared_relu._backward_kernel,
            ["*bf16", "*bf16", "*bf16", "*bf16", "*fp32", "*bf16", "*fp32", "*bf16"],
            {"HAS_GRADIENT_MORE": more, "HAS_MORE": more, "tail": 16, "inner": 1856, "COLUMNS": 1024},
        )
        for name, more in (("", False), (" of two", True))
    },
    **{
        f"a step of {name}": (
            adam._step_kernel,
            [f"*{dtype}"] * 4 + ["*fp32", "i64"] + ["fp32"] * 6,
            {"DECOUPLED": decoupled, "DECAYS": True, "MAXIMIZE": True, "ELEMENTS": adam.ELEMENTS},
        )
        for name, dtype, decoupled in (("AdamW", "bf16", True), ("Adam in fp32", "fp32", False))
    },
}


def described(*block):
    """The type of a tensor that is described to TMA."""
    return f"tensordesc<bf16{list(block)}>"


def described_to_gluon(*block):
    """Likewise, with the layout of its blocks in shared memory."""
    layout = gluon.gl.NVMMASharedLayout.get_default_for(list(block), gluon.gl.bfloat16)
    return f"tensordesc<bf16{list(block)},{layout!r}>"


M, N, K = gluon.BLOCK_M, gluon.BLOCK_N, gluon.BLOCK_K
OF_QWEN3 = {"HIDDEN": 2048, "INNER": 768}
GATHERING = {
    "tiles": (
        gathering._tiles_kernel,
        ["*i32"] * 4 + ["i32"] * 2,
        {"BLOCK_M": gathering.BLOCK_M, "EXPERTS": 128, "num_warps": 1},
    ),
    **{
        f"first projection of gathered rows{name}": (
            gathering._up_kernel,
            ["*bf16", described(2, 128, K), "*i32", "*fp32", "*bf16", "*bf16", "*i32", "*i32", "i32"],
            {**OF_QWEN3, "BN": gathering.GATE_COLUMNS, "KEEP": keep, **gathering.OPTIONS},
        )
        for name, keep in (("", True), (", lean", False))
    },
    "backward of the second projection": (
        gathering._down_backward_kernel,
        ["*bf16", described(K, 256), "*i32", "*fp32"] + ["*bf16"] * 3 + ["*fp32", "*i32", "*i32", "i32", "i32"],
        {**OF_QWEN3, "BN": gathering.COLUMNS, **gathering.OPTIONS},
    ),
    "sum of parts": (gathering._sum_parts_kernel, ["*fp32", "*fp32", "i32"], {"PARTS": 3, "BLOCK": 1024}),
}
COMPILED |= GATHERING
if device.IS_TRITON_36:
    OF_GLUON = {"STEP": 132, **gluon.CONSTANTS}
    COMPILED |= {
        **{
            f"gluon: products{name}": (
                gluon._multiply_kernel,
                ["*bf16", described_to_gluon(M, K), block, described_to_gluon(M, N), "*i32", "*i32", "i32"],
                {"A": 768, "B": 2048, "TRANSPOSED": turned, **OF_GLUON},
            )
            for name, turned, block in (
                ("", False, described_to_gluon(K, N)),
                (", turned", True, described_to_gluon(N, K)),
            )
        },
        **{
            f"gluon: gradients of matrices, {side} gathered": (
                gluon_outer._outer_kernel,
                ["*bf16", described_to_gluon(K, N if is_left else M), described_to_gluon(M, N), *["*i32"] * 3, "i32"],
                {"M": 2048, "N": 768, "IS_LEFT": is_left, **OF_GLUON},
            )
            for side, is_left in (("left", True), ("right", False))
        },
    }


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
