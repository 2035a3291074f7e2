"""A `transformer_engine` that runs anywhere: the grouped GEMM's own signature and rules, computed by torch.

What it checks is what the real one would read wrongly in silence or crash at: names and order of arguments, lists where
lists are wanted, sizes as Python ints that add up, layouts, contiguous matrices, where results go, and that there is
something to multiply. Read in 2.20.2: `pytorch/cpp_extensions/gemm.py`, `csrc/extensions/gemm.cpp`.
"""

import sys
import types
from collections import Counter

import torch

from tests import fake_te_parts

CALLS: Counter[str] = Counter()
"""Products by layout."""


def general_grouped_gemm(
    A,
    B,
    out,
    quantization_params,
    out_dtype,
    layout="TN",
    m_splits=None,
    gelu=False,
    grad=False,
    accumulate=False,
    bias=None,
    use_bias=False,
    use_split_accumulator=False,
    D_dtype=None,
    single_output=False,
):
    number = len(A)
    assert all(type(each) is list for each in (A, B, out, quantization_params, m_splits))
    assert (len(B), quantization_params, len(m_splits)) == (number, [None] * number, number)
    assert all(type(size) is int and size >= 0 for size in m_splits)
    assert sum(m_splits) > 0, "no kernel is asked what it does with nothing"
    assert (gelu, bias, use_bias, accumulate, D_dtype) == (False, None, False, False, None)
    assert layout in ("TN", "NN", "NT")
    assert single_output == (layout != "NT"), "the gradient of a matrix goes to a matrix of its own"
    assert len(out) == (1 if single_output else number)
    assert {each.dtype for each in (*A, *B, *out)} == {out_dtype}
    assert out_dtype in (torch.bfloat16, torch.float16), "fp32 is multiplied in TF32"
    assert all(each.ndim == 2 and each.is_contiguous() and each.shape[1] % 8 == 0 for each in (*A, *B, *out))
    assert [len(each) for each in B] == m_splits
    assert not torch.is_grad_enabled() or not any(each.requires_grad for each in (*A, *B, *out))
    results = list(out[0].split(m_splits)) if single_output else out
    for a, b, result in zip(A, B, results, strict=True):
        if layout == "NT":
            assert len(a) == len(b)
        result.copy_(
            {"TN": lambda b=b, a=a: b @ a.t(), "NN": lambda b=b, a=a: b @ a, "NT": lambda b=b, a=a: b.t() @ a}[layout]()
        )
    CALLS[layout] += 1
    return out, [], []


def install(monkeypatch, gemm=general_grouped_gemm):
    """Let `import transformer_engine.pytorch` give the fake, with this function in it; None: without one."""
    from moe_accel.kernels import te, te_attention, te_fp8, te_norm, te_router, te_rows

    CALLS.clear()
    names = ["transformer_engine"]
    names += [f"transformer_engine.pytorch{more}" for more in ("", ".cpp_extensions", *fake_te_parts.NAMES)]
    for name in [*names, "transformer_engine_torch"]:
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    if gemm is not None:
        sys.modules["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm = gemm
    fake_te_parts.fill(sys.modules, CALLS)
    monkeypatch.setenv(te.CUTLASS, "1")  # te.py sets it for good
    caches = (
        te._gemm,
        te_norm._functions,
        te_attention._kind,
        te_attention._module,
        te_attention._suits,
        te_fp8._functions,
        te_fp8._quantiser,
        te_router._function,
        te_rows._functions,
    )
    for each in caches:
        each.cache_clear()


def install_as_on_a_gpu(monkeypatch):
    """The fake, and values that it is given wherever they are."""
    from moe_accel.kernels import te

    install(monkeypatch)
    monkeypatch.setattr(te, "on_gpu", lambda values: True)
    monkeypatch.setattr(te, "version", lambda: "2.20.2")
