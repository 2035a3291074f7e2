"""The kernels' arguments on a GPU, by what they compute: `test_kernels.py` compiles them for sm_90.

Each is a kernel, the types of its first parameters, and its constants by name.
"""

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
from moe_accel.kernels import more as kernels_more
from tests.unit.router_rules import RULES

BIAS = glu.ExpertBias(torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8), torch.tensor([1, 0, 1]))
SOME = torch.empty(0)
COMPILED_GATES = {  # what is added, where rows end, bias, gate, I
    "": (None, None, None, glu.SWIGLU, 768),
    " of two": (SOME, None, None, glu.SWIGLU, 768),
    " with room": (None, SOME, None, glu.SWIGLU, 768),
    " of gpt-oss": (None, None, BIAS, glu.Gate(1.702, limit=7.0, shift=1.0, interleaved=True), 2880),
    " of gpt-oss, of two, with room": (SOME, SOME, BIAS, glu.Gate(1.702, limit=7.0, shift=1.0, interleaved=True), 2880),
    " of gelu": (None, None, None, glu.GELU_TANH, 704),
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
            ["*bf16", "*bf16", "*i64", "*i64", "*i32", "*bf16", "i32", "i32", "i32", "i32"],
            {"HAS_MORE": more, "HAS_STOP": stop, "COPIES": 8, "COLUMNS": 1024},
        )
        for name, more, stop in (("", False, False), (" of two", True, False), (" with room", True, True))
    },
    **{
        f"gather{name}": (
            rows._gather_kernel,
            ["*bf16", "*i64", "*i64", "*i32", "*bf16", "i32", "i32", "i32", "i32", "i32"],
            {"HAS_STOP": stop, "COPIES": 8, "COLUMNS": 1024},
        )
        for name, stop in (("", False), (" with room", True))
    },
    "clearing": (kernels_more._clear_kernel, ["*bf16", "*i32", "i32"], {"width": 1536, "COLUMNS": 1024}),
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
            ["*bf16", "*bf16", "*bf16", "*i16", "*fp32", "*i32", "*bf16"],
            {**glu._constants(of_two, stop, bias, gate), "tail": 16, "inner": inner, "COLUMNS": glu.COLUMNS},
        )
        for name, (of_two, stop, bias, gate, inner) in COMPILED_GATES.items()
    },
    **{
        f"glu backward{name}": (
            glu._backward_kernel,
            ["*bf16", "*bf16", "*bf16", "*bf16", "*bf16", "*i16", "*fp32", "*i32", "*bf16", "*fp32", "*bf16"],
            {
                "HAS_GRADIENT_MORE": of_two is not None,
                **glu._constants(of_two, stop, bias, gate),
                "tail": 0,
                "inner": inner,
                "COLUMNS": glu.COLUMNS,
            },
        )
        for name, (of_two, stop, bias, gate, inner) in COMPILED_GATES.items()
    },
    **{
        f"squared relu{name}": (
            squared_relu._forward_kernel,
            ["*bf16", "*bf16", "*fp32", "*i32", "*bf16"],
            {"HAS_MORE": more, "HAS_STOP": more, "tail": 0, "inner": 1856, "COLUMNS": 1024},
        )
        for name, more in (("", False), (" of two", True))
    },
    **{
        f"squared relu backward{name}": (
            squared_relu._backward_kernel,
            ["*bf16", "*bf16", "*bf16", "*bf16", "*fp32", "*i32", "*bf16", "*fp32", "*bf16"],
            {"HAS_GRADIENT_MORE": more, "HAS_MORE": more, "HAS_STOP": more, "tail": 16, "inner": 1856, "COLUMNS": 1024},
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
