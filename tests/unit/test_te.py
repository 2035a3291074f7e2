"""`kernels: te`: the numbers of `fused`, through TransformerEngine's calling contract, or the exact reason why not."""

import copy
import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from moe_accel import experts, plugin
from moe_accel.errors import ConfigError, DependencyError
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import te, te_parts
from moe_accel.kernels.grouped import TORCH, grouped_mm
from tests import fake_transformer_engine
from tests.fake_transformer_engine import CALLS
from tests.families import build_tiny, experts_modules

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
HOPPER = (9, 0)
NUM_TOKENS, TOP_K = 24, 2


# ---- numbers


def computed(module, kernels, x, choices, weights):
    module = copy.deepcopy(module)
    experts.install(module, experts.Settings(kernels))
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    output = module(x, choices, weights)
    leaves = {"x": x, "weights": weights, **dict(module.named_parameters())}
    gradient = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return {
        "output": output,
        **dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), gradient), strict=True)),
    }


@pytest.mark.parametrize("routing", ["random", "one expert", "no tokens"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_have_the_bits_of_fused(package, family, routing):
    experts.register()
    module = next(module for _, module in experts_modules(build_tiny(family, BF16)))
    num_tokens = 0 if routing == "no tokens" else NUM_TOKENS
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        num_tokens, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator
    ).bfloat16()
    choices = torch.randn(num_tokens, module.num_experts, generator=generator).topk(TOP_K).indices
    if routing == "one expert":
        choices = torch.ones(num_tokens, 1, dtype=torch.int64)
    weights = torch.rand(choices.shape, generator=generator)
    fused = computed(module, "fused", x, choices, weights)
    assert not CALLS
    found = computed(module, "te", x, choices, weights)
    for name, expected in fused.items():
        assert torch.equal(found[name], expected), name
    assert ({} if routing == "no tokens" else {"TN": 2, "NN": 2, "NT": 2}) == CALLS


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
def test_adapters_go_the_same_way(package, lean):
    torch.manual_seed(0)
    num_experts, width, inner, rank = 4, 8, 16, 8
    routing = sort_by_expert(torch.randn(NUM_TOKENS, num_experts).topk(TOP_K).indices, num_experts)
    shapes = (NUM_TOKENS, width), (num_experts, width, 2 * inner), (num_experts, inner, width)
    x, up, down = (torch.randn(shape, dtype=BF16) for shape in shapes)
    shapes = (width, rank), (rank, 2 * inner), (inner, rank), (rank, width)
    factors = [torch.randn(num_experts, *shape, dtype=BF16, requires_grad=True) for shape in shapes]
    weight_p = torch.rand(NUM_TOKENS * TOP_K, requires_grad=True)
    leaves, found = [x.requires_grad_(), weight_p, *factors], []
    for gemm in (TORCH, te.GEMM):
        how = (Factors(*factors[:2]), Factors(*factors[2:]))
        output = gated_experts(x, up, down, weight_p, routing, *how, lean=lean, gemm=gemm)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert sum(CALLS.values()) == 17 + lean
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strides", ["straight", "transposed", "every other"])
def test_one_product_is_differentiable_in_any_strides(package, strides):
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 16], dtype=torch.int32)
    rows, gradient = torch.randn(16, 8, dtype=BF16, requires_grad=True), torch.randn(16, 24, dtype=BF16)
    shape = {"straight": (3, 8, 24), "transposed": (3, 24, 8), "every other": (3, 8, 48)}[strides]
    stored = torch.randn(shape, dtype=BF16, requires_grad=True)
    matrices = {"straight": stored, "transposed": stored.transpose(1, 2), "every other": stored[..., ::2]}[strides]
    found = []
    for product in (grouped_mm(rows, matrices, ends), te.multiply(rows, matrices, ends)):
        found.append([product, *torch.autograd.grad(product, [rows, stored], gradient, retain_graph=True)])
    assert sum(CALLS.values()) == 3
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_is_not_for_it_goes_the_usual_way(package):
    ends = torch.tensor([3, 16], dtype=torch.int32)
    for dtype, inner in ((torch.float32, 8), (BF16, 6)):
        rows, matrices = torch.randn(16, inner, dtype=dtype), torch.randn(2, inner, 8, dtype=dtype)
        assert torch.equal(te.multiply(rows, matrices, ends), grouped_mm(rows, matrices, ends))
        assert torch.equal(te.outer(rows, rows[:, :inner], ends), TORCH.outer(rows, rows[:, :inner], ends))
    assert not CALLS


# ---- whether it can be used


def told(device):
    with pytest.raises((ConfigError, DependencyError)) as error:
        plugin.choose_kernels("te", device)
    return type(error.value), error.value.message.removeprefix("kernels=te cannot be used: "), error.value.hint


def test_a_device_it_does_not_compute_on_is_a_config_error(package):
    assert told(CPU) == (ConfigError, "it needs a CUDA GPU, and this process computes on cpu", "kernels: auto")
    package.setattr(te, "capability", lambda device: (7, 5))
    why = "it needs a GPU with bf16 (compute capability 8.0 or more), and this one has 7.5"
    assert told(GPU) == (ConfigError, why, "kernels: auto")


def test_a_missing_package_is_named_with_the_command_that_brings_it(package):
    package.setattr(te, "is_installed", lambda: False)
    hint = "kernels: auto, or pip install --no-build-isolation 'transformer-engine[pytorch]>=2.17'"
    assert told(GPU) == (DependencyError, "the package transformer_engine is not installed", hint)


def test_a_package_that_cannot_be_used_gives_its_own_reason(package):
    package.setattr(te, "version", lambda: "2.1.0")
    hint = "kernels: auto; moe-accel doctor says more"

    def older(A, B, out, out_dtype, workspaces, layout="TN", m_splits=None):
        raise AssertionError("never called")

    fake_transformer_engine.install(package, older)
    why = "general_grouped_gemm of transformer_engine 2.1.0 takes no grad, quantization_params, single_output"
    assert told(GPU) == (DependencyError, why, hint)
    fake_transformer_engine.install(package, None)
    assert told(GPU) == (DependencyError, "transformer_engine 2.1.0 has no general_grouped_gemm", hint)
    fake_transformer_engine.install(package)

    def fail(name):
        raise OSError("libtransformer_engine.so: undefined symbol: cublasLtGroupedMatrixLayoutInit_internal")

    package.setattr(importlib, "import_module", fail)
    kind, why, _ = told(GPU)
    assert (kind, why[:82]) == (
        DependencyError,
        "import transformer_engine.pytorch fails: OSError: libtransformer_engine.so: undefi",
    )


def test_one_product_is_tried_before_it_is_taken(package):
    assert te.tried(CPU) is None
    assert CALLS == {"NN": 1}
    package.setattr(te, "version", lambda: "2.20.2")

    def wrong(A, B, out, quantization_params, out_dtype, layout="TN", m_splits=None, grad=False, single_output=False):
        out[0].zero_()

    fake_transformer_engine.install(package, wrong)
    assert te.tried(CPU) == "general_grouped_gemm of transformer_engine 2.20.2 is off by 100%"

    def failing(A, B, out, quantization_params, out_dtype, layout="TN", m_splits=None, grad=False, single_output=False):
        raise RuntimeError("CUDA Error: no kernel image is available for execution on the device")

    fake_transformer_engine.install(package, failing)
    why = "RuntimeError: CUDA Error: no kernel image is available for execution on the device"
    assert te.tried(CPU) == f"general_grouped_gemm of transformer_engine 2.20.2 fails: {why}"


def test_chosen_it_is_told_with_its_version_and_its_cost(package):
    package.setattr(te, "version", lambda: "2.20.2")
    package.setitem(te_parts.PARTS, "experts", te_parts.PARTS["experts"]._replace(tried=lambda device: None))
    assert str(plugin.choose_kernels("te", GPU)) == (
        "te (asked for: grouped GEMMs of the experts by TransformerEngine 2.20.2, all else as fused; "
        "waits once a layer for the experts' row counts)"
    )
    assert plugin.choose_kernels("auto", GPU).value == "fused"


def test_it_is_given_the_cudnn_that_is_in_the_process(tmp_path):
    library = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, names in ((one, ("libcudnn.so.9", "libcudnn_ops.so.9")), (other, ("libcudnn.so.9",))):
        folder.mkdir()
        for name in names:
            shutil.copy(library, folder / name)
    for name in ("libcudnn_broken.so.9", "libcudnn.so", "libother.so.9"):
        (one / name).write_text("no library")

    def shared(*files):
        maps = tmp_path / "maps"
        maps.write_text("".join(f"7f-7f r-xp 0 103:05 77 {file}\n" for file in ("/lib/libc.so.6", *files)))
        return te.share_cudnn(maps)

    both = [str(one / "libcudnn.so.9"), str(one / "libcudnn_ops.so.9")]
    assert shared(one / "libcudnn.so.9", one / "libcudnn.so.9") == both
    assert shared(one / "libcudnn.so.9", other / "libcudnn.so.9") == []  # it is too late
    assert shared() == te.share_cudnn(tmp_path / "nowhere") == []


def test_its_one_kernel_on_hopper_is_asked_for_unless_somebody_did(package):
    for set_before, expected in ((None, "1"), ("0", "0")):
        package.delenv(te.CUTLASS)
        if set_before is not None:
            package.setenv(te.CUTLASS, set_before)
        te._gemm.cache_clear()
        te._gemm()
        assert os.environ[te.CUTLASS] == expected
