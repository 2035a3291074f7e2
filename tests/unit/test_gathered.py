"""Experts whose GEMMs gather their rows are the same function as `gated_experts`, and are chosen where they pay."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from moe_accel import MoEConfig, plugin
from moe_accel.experts import gated, gathered
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.gathered import gathered_experts, gathers
from moe_accel.experts.routing import sort_by_expert
from moe_accel.kernels import gathering
from moe_accel.kernels.glu import GELU_TANH
from moe_accel.kernels.grouped import GroupedGemm, grouped_mm, grouped_outer
from tests.families import build_tiny
from tests.unit.fresh_python import python

GPU = torch.device("cuda", 0)

NUM_ROWS, HIDDEN, INNER, NUM_EXPERTS = 40, 16, 24, 6
CHOICES = {
    "random": lambda: torch.randn(NUM_ROWS, NUM_EXPERTS).topk(2).indices,
    "one expert": lambda: torch.full((NUM_ROWS, 1), 4),
    "some elsewhere": lambda: torch.randint(0, 2 * NUM_EXPERTS, (NUM_ROWS, 3)).sort(1).values,
}


def tensors(weight_dtype=torch.float32, dtype=torch.float32):
    torch.manual_seed(0)
    up = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN, dtype=weight_dtype) / 4
    down = torch.randn(NUM_EXPERTS, HIDDEN, INNER, dtype=weight_dtype) / 4
    return torch.randn(NUM_ROWS, HIDDEN, dtype=dtype), up.transpose(1, 2), down.transpose(1, 2)


def routed(choices):
    outside = choices >= NUM_EXPERTS
    num_pairs = int((~outside).sum())
    routing = sort_by_expert(choices.masked_fill(outside, -1), NUM_EXPERTS, num_pairs)
    return routing, torch.rand(num_pairs)


def both_ways(function, leaves, trained=(0, 1, 2, 3)):
    leaves = [each.detach().requires_grad_(at in trained) for at, each in enumerate(leaves)]
    output = function(*leaves)
    gradient = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [leaves[at] for at in trained], gradient)]


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_it_is_gated_experts(choices, lean):
    x, up, down = tensors()
    routing, weight_p = routed(choices())
    leaves = x, up, down, weight_p
    found = both_ways(lambda *given: gathered_experts(*given, routing, lean), leaves)
    expected = both_ways(lambda *given: gated_experts(*given, routing, lean=lean), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride() or one.ndim < 3


@pytest.mark.parametrize("trained", [(0,), (1, 2), (2, 3), (3,)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(trained):
    x, up, down = tensors()
    routing, weight_p = routed(CHOICES["random"]())
    leaves = x, up, down, weight_p
    found = both_ways(lambda *given: gathered_experts(*given, routing), leaves, trained)
    expected = both_ways(lambda *given: gated_experts(*given, routing), leaves, trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_in_another_dtype_get_gradients_in_theirs():
    x, up, down = tensors(torch.float32, torch.bfloat16)
    routing, weight_p = routed(CHOICES["random"]())
    leaves = x, up, down, weight_p
    found = both_ways(lambda *given: gathered_experts(*given, routing), leaves)
    expected = both_ways(lambda *given: gated_experts(*given, routing), leaves)
    assert [each.dtype for each in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
def test_between_forward_and_backward_it_keeps_x_u_and_the_routing(lean):
    x, up, down = (each.requires_grad_() for each in tensors())
    routing, weight_p = routed(CHOICES["random"]())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        gathered_experts(x, up, down, weight_p.requires_grad_(), routing, lean)
    given = {each.data_ptr() for each in (x, up, down, weight_p)}
    of_floats = [each for each in kept if each.is_floating_point() and each.data_ptr() not in given]
    assert [tuple(each.shape) for each in of_floats] == ([] if lean else [(len(weight_p), 2 * INNER)])


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)


def fake(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta").as_subclass(OnGpu)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(gathered, "IS_ON", True)
    monkeypatch.setattr(gathered, "IS_TRITON_36", True)
    monkeypatch.setattr(gathered, "capability", lambda device: (9, 0))
    return monkeypatch


QWEN3 = {"hidden": 2048, "inner": 768, "num_pairs": 131_072}


def chosen(hidden, inner, num_pairs, dtype=torch.bfloat16, turned=True):
    up, down = fake(4, 2 * inner, hidden), fake(4, hidden, inner)
    up, down = (
        (up.transpose(1, 2), down.transpose(1, 2)) if turned else (fake(4, hidden, 2 * inner), fake(4, inner, hidden))
    )
    return gathers(fake(16, hidden, dtype=dtype), up, down, num_pairs)


def test_it_is_chosen_where_it_was_measured_to_pay(hopper):
    assert chosen(**QWEN3)
    for other in (
        {"num_pairs": 8192},
        {"inner": 2048},
        {"hidden": 2880},
        {"inner": 640},
        {"dtype": torch.float32},
        {"turned": False},
    ):
        assert not chosen(**QWEN3 | other), other
    with hopper.context() as apart:
        apart.setattr(OnGpu, "data_ptr", lambda self: 8)
        assert not chosen(**QWEN3)
    assert chosen(**QWEN3)
    hopper.setattr(gathered, "capability", lambda device: (10, 0))
    assert not chosen(**QWEN3)


@pytest.mark.parametrize(("variables", "is_on"), [({}, True), ({"MOE_ACCEL_GATHERING": "0"}, False)], ids=["", "0"])
def test_it_is_on_and_can_be_switched_off(hopper, variables, is_on):
    done = python("from moe_accel.experts import gathered; print(gathered.IS_ON)", **variables)
    assert done.stdout == f"{is_on}\n"
    hopper.setattr(gathered, "IS_ON", is_on)
    assert chosen(**QWEN3) == is_on


@pytest.mark.parametrize(
    ("family", "sizes", "told"),
    [
        ("qwen3_moe", {}, True),
        ("mixtral", {"intermediate_size": 2048}, False),
        ("qwen3_moe", {"moe_intermediate_size": 128}, False),
        ("gpt_oss", {}, False),
    ],
)
def test_the_report_says_where_rows_are_gathered(hopper, new_accelerate_state, family, sizes, told):
    hopper.setattr(gated, "suits", lambda _, *widths: gathered.suits(GPU, *widths))
    width = {"intermediate_size": 256} if family == "gpt_oss" else {"moe_intermediate_size": 256}
    accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig())
    accelerator.prepare(build_tiny(family, torch.bfloat16, hidden_size=256, **width | sizes))
    (report,) = plugin.reports(accelerator)
    assert ("which gather their rows from 65,536 on" in report.kernels.reason) == told


def test_only_plain_swiglu_goes_that_way(monkeypatch):
    asked = []
    monkeypatch.setattr(gated, "gathers", lambda *given: asked.append(given) or True)
    monkeypatch.setattr(gated, "gathered_experts", lambda x, *_: torch.zeros_like(x))
    x, up, down = tensors()
    routing, weight_p = routed(CHOICES["random"]())
    assert not gated_experts(x, up, down, weight_p, routing).any()
    assert asked.pop()[3] == len(weight_p)
    a, b = torch.randn(NUM_EXPERTS, HIDDEN, 4), torch.randn(NUM_EXPERTS, 4, 2 * INNER)
    for other in (
        {"gate": GELU_TANH},
        {"up_factors": Factors(a, b)},
        {"biases": (torch.randn(NUM_EXPERTS, 2 * INNER), None)},
        {"gemm": GroupedGemm(grouped_mm, lambda *given: grouped_outer(*given))},
    ):
        assert gated_experts(x, up, down, weight_p, routing, **other).any()
    assert not asked


def test_tiles_are_whole():
    assert gathering.fits(2048, 768)
    assert not gathering.fits(2880, 2880)
    assert not gathering.fits(2048, 384 + 128 + 8)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kept_layers", [0, 1])
def test_a_model_trains_as_without(checkpointing, kept_layers, monkeypatch, new_accelerate_state):
    losses, gradients, used = {}, {}, []
    for way in ("apart", "gathered"):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        monkeypatch.setattr(gated, "gathers", lambda *_, way=way: way == "gathered" and not used.append(way))
        accelerator = Accelerator(cpu=True, parallelism_config=MoEConfig(kept_layers=kept_layers))
        model = build_tiny("qwen3_moe")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        index = torch.arange(64).view(2, 32) * 7 % 64
        losses[way] = []
        for _ in range(3):
            loss = model(input_ids=index, labels=index).loss
            accelerator.backward(loss)
            gradients[way] = {name: each.grad.clone() for name, each in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            losses[way].append(loss.item())
    assert len(used) >= 6
    assert losses["gathered"] == pytest.approx(losses["apart"], rel=1e-5)
    for name, expected in gradients["apart"].items():
        torch.testing.assert_close(gradients["gathered"][name], expected, rtol=1e-3, atol=1e-6)
