"""Routers compute by one rule of the kernels where that is proven, with the same numbers, and stay otherwise.

The kernels' plain torch form stands for them here (`test_kernels.py` compares the two): routers are told that their
tokens are on a GPU, and `route` knows that they are not.
"""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from moe_accel import block
from moe_accel.experts import router
from moe_accel.experts.router_proof import fuse_router, prove
from moe_accel.kernels.router import route, route_torch
from moe_accel.swap import own_class
from tests.families import available_families, build_tiny, tiny_inputs, tiny_loss
from tests.unit.router_rules import FUSED, RULES, given

SOME = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "minimax_m2"]
"""The families of `FUSED` that are run by default; `FAMILIES` runs all."""
FAMILIES = [
    pytest.param(family, marks=() if family in SOME else pytest.mark.slow)
    for family in available_families()
    if family in FUSED
]


@pytest.fixture
def fused(monkeypatch):
    """Routers compute as on a GPU; returns the logits that they have routed."""
    seen = []

    def routed(logits, *how):
        seen.append(logits)
        return route(logits, *how)

    monkeypatch.setattr(router, "use_triton", lambda values: values.numel() > 0)
    monkeypatch.setattr(router, "route", routed)
    return seen


def routers(model):
    return [module for module in model.modules() if re.search(block.ROUTERS, type(module).__name__)]


def prepared(fused, family, dtype=torch.float32, **config):
    """A model, and its copy whose routers are fused."""
    model = build_tiny(family, dtype, **config)
    model.set_experts_implementation("eager")
    other = copy.deepcopy(model)
    block.fuse_routers(other, None)
    fused.clear()  # of the proof
    return model, other


# ---- the rules


@pytest.mark.parametrize("name", [name for name, (_, num_experts, _) in RULES.items() if num_experts <= 32])
def test_the_definition_has_the_gradient_of_finite_differences(name):
    rule, _, _ = RULES[name]
    logits, bias, _ = given(name, num_tokens=2, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: route(x, bias, rule, torch.float64)[0], logits)


@pytest.mark.parametrize("name", RULES)
def test_experts_come_in_the_order_of_topk(name):
    rule, num_experts, biased = RULES[name]
    logits, bias, _ = given(name)
    weights, experts, _ = route_torch(logits, bias, rule, torch.float32)
    scores = logits if bias is None else logits.sigmoid() + bias
    if rule.limits:
        best = scores.sigmoid() if bias is None else scores
        size = num_experts // rule.num_groups
        of_group = best.view(len(best), rule.num_groups, size).topk(2).values.sum(-1)
        near = of_group.topk(rule.top_groups).indices[:, :, None] == torch.arange(num_experts) // size
        scores = scores.masked_fill(~near.any(1), float("-inf"))
    assert torch.equal(experts, scores.topk(rule.top_k).indices)
    if not biased:
        assert (weights.diff() <= 0).all()


def test_of_equal_scores_the_lower_index_comes_first_and_nan_is_the_largest():
    rule = RULES["gpt-oss, scaled"][0]
    logits = torch.zeros(2, 32)
    logits[1, [7, 30]] = float("nan")
    weights, experts, _ = route_torch(logits, None, rule, torch.float32)
    assert experts.tolist() == [[0, 1, 2, 3], [7, 30, 0, 1]]
    assert weights[1].isnan().all()


def largest_errors(found, expected):
    return [float((one.double() - other).abs().max()) for one, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SOME)
def test_errors_are_no_larger_than_native(family, dtype, fused):
    """Against the router's own forward in fp64 from the same logits, weights and gradients of tokens and weight."""
    (own, *_), (ours, *_) = map(routers, prepared(fused, family, dtype))
    exact = copy.deepcopy(own).double()
    x = torch.randn(300, own.weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    extra = [torch.linspace(-0.1, 0.1, 8)] * (family == "minimax_m2")
    found = []
    for module, dtype_of_x in ((exact, torch.float64), (own, dtype), (ours, dtype)):
        leaf = x.to(dtype_of_x).requires_grad_()
        outputs = module(leaf, *extra)
        (experts,) = (each for each in outputs if each.dtype == torch.int64)
        (weights,) = (each for each in outputs if each.shape == experts.shape and each is not experts)
        probe = torch.randn(300, 8, generator=torch.Generator().manual_seed(2)).to(weights.dtype)
        experts, order = experts.sort(1)
        total = (weights.gather(1, order) * probe.gather(1, experts)).double().sum()
        found.append((experts, weights.gather(1, order).detach(), *torch.autograd.grad(total, (leaf, module.weight))))
    assert len(fused) == 1
    agreed = (found[1][0] == found[0][0]).all(1) & (found[2][0] == found[0][0]).all(1)
    assert agreed.float().mean() > 0.9  # where a tie of bf16 falls the other way, weights are those of other experts
    truth, native, mine = ((weights[agreed], x_grad[agreed]) for _, weights, x_grad, _ in found)
    floor = 4 * torch.finfo(torch.float32).eps
    for one, other in zip(largest_errors(mine, truth), largest_errors(native, truth), strict=True):
        assert one <= 1.2 * other + floor


# ---- the families


@pytest.mark.parametrize("family", [*SOME, "phimoe", "mistral4", "gemma4", "axk2", "deepseek_v4", "jamba"])
def test_what_a_router_computes_is_found_or_it_stays(family):
    model = build_tiny(family)
    found = {None if (proof := prove(module)) is None else str(proof.rule) for module in routers(model)}
    rule = FUSED.get(family, "top 2 by softmax" if family == "jamba" else None)
    assert found == ({rule} if routers(model) else set())  # Jamba's is in its block in 5.17, not in 5.24


@pytest.mark.slow
@pytest.mark.parametrize("family", available_families())
def test_what_any_router_computes_is_found_or_it_stays(family):
    found = {None if (proof := prove(module)) is None else str(proof.rule) for module in routers(build_tiny(family))}
    assert found <= {FUSED.get(family, "top 2 by softmax" if family == "jamba" else None)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_same_numbers(family, fused):
    """Outputs of the routers, with the same bits in logits; the loss, and every gradient."""
    model, other = prepared(fused, family)
    outputs = []
    for each in (model, other):
        outputs.append([])
        for module in routers(each):
            module.register_forward_hook(lambda module, args, output, to=outputs[-1]: to.append(output))
        tiny_loss(each, tiny_inputs(family)).backward()
    assert len(fused) == len(outputs[1]) > 0
    for one, two in zip(*outputs, strict=True):
        for expected, found in zip(one, two, strict=True):
            assert found.dtype == expected.dtype
            assert found.requires_grad == expected.requires_grad
            if found.shape[1] == 8 and one is outputs[0][0]:
                assert torch.equal(found, expected)  # the logits; nothing of ours is before the first router
            # 2: topk(sorted=False) has no order
            torch.testing.assert_close(found.sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-5)
    expected = {name: each.grad for name, each in model.named_parameters()}
    for name, each in other.named_parameters():
        if expected[name] is None:
            assert each.grad is None
        else:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(each.grad, expected[name], rtol=0, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_dtypes_are_those_of_the_model(family, dtype, autocast, fused):
    (own, *_), (ours, *_) = map(routers, prepared(fused, family, dtype))
    x = torch.randn(40, own.weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    extra = [torch.linspace(-0.1, 0.1, 8)] * (family == "minimax_m2")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = own(x, *extra), ours(x, *extra)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert len(fused) == (0 if autocast and family == "deepseek_v3" else 1)  # it rounds sigmoids to bf16 there


# ---- training


def test_training_is_that_of_the_routers_own_function(fused):
    """Losses, the router's aux loss among them, and weights after some steps."""
    model, other = prepared(fused, "qwen3_moe", norm_topk_prob=True, router_aux_loss_coef=0.1)
    losses = []
    for each in (model, other):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        losses.append([])
        for step in range(5):
            outputs = each(**tiny_inputs("qwen3_moe", seed=step), output_router_logits=True)
            assert outputs.aux_loss > 0
            assert len(outputs.router_logits) == 2
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(outputs.loss.detach()))
    assert len(fused) == 2 * 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=5e-5)  # a hundredth of five steps of Adam


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_routes_with_the_kernels_too(fused, reentrant):
    model, other = prepared(fused, "qwen3_moe")
    for each in (model, other):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
        tiny_loss(each, tiny_inputs("qwen3_moe")).backward()
    assert len(fused) == 2 * 2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-6)


def test_logits_alone_and_weights_alone_have_gradients(fused):
    _, model = prepared(fused, "qwen3_moe")
    (module, *_) = routers(model)
    x = torch.randn(5, 32)
    for at in (0, 1):
        (gradient,) = torch.autograd.grad((module(x)[at] ** 2).sum(), module.weight)
        assert gradient.any()


# ---- others stay


class Plain(nn.Module):
    """A router of the usual kind, of which others differ in one thing."""

    def __init__(self):
        super().__init__()
        self.top_k, self.scale = 2, 3.0
        self.weight = nn.Parameter(torch.randn(6, 24))
        self.seen = nn.Buffer(torch.zeros(1))

    def forward(self, x):
        logits = functional.linear(x, self.weight)
        weights, experts = self.choose(logits).topk(self.top_k)
        return logits, self.scale * weights, experts

    def choose(self, logits):
        return logits.softmax(-1, dtype=torch.float32)


class Tempered(Plain):
    def choose(self, logits):
        return (logits / 0.9).softmax(-1)


class Noisy(Plain):
    def choose(self, logits):
        return (logits + self.training * torch.randn_like(logits)).softmax(-1)


class Counting(Plain):
    def choose(self, logits):
        self.seen += len(logits)
        return super().choose(logits)


class Rounding(Plain):
    def choose(self, logits):
        return super().choose(logits).bfloat16().float()


class Detached(Plain):
    def choose(self, logits):
        return super().choose(logits).detach() + 0 * logits


class Changing(Plain):
    def forward(self, x):
        return super().forward(x.mul_(2))


class Longer(Plain):
    def forward(self, x):
        return *super().forward(x), x


class Optional(Plain):
    def forward(self, x, mask=None):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Tempered, Noisy, Counting, Rounding, Detached, Changing, Longer, Optional])
def test_a_router_that_does_anything_else_stays(kind):
    assert str(prove(Plain()).rule) == "top 2 by softmax"
    module = kind()
    assert fuse_router(module) is None
    assert type(module) is kind


def test_a_proof_leaves_the_module_and_the_random_state_alone():
    module = Plain()
    module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert prove(module).rule.scale == 3.0
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fused_router_steps_aside(fused):
    _, model = prepared(fused, "qwen3_moe", norm_topk_prob=True)
    module, x = routers(model)[0], torch.randn(5, 32)
    expected = own_class(module).forward(module, x)
    torch.testing.assert_close(module(hidden_states=x), expected)
    assert len(fused) == 1
    with pytest.raises(TypeError):
        module(tokens=x)
    assert module(x[:0])[1].shape == (0, 2)
    module.top_k = 3
    assert module(x)[1].shape == (5, 3)
    module.top_k = 2
    module.double()
    assert module(x.double())[1].dtype == torch.float64
    assert len(fused) == 1


def test_a_router_with_a_forward_of_its_own_keeps_it():
    module = Plain()
    module.forward = lambda x: 2 * x
    assert fuse_router(module) is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_a_compiled_router_has_its_own_function_and_no_graph_break(fused):
    _, model = prepared(fused, "qwen3_moe")
    module, x = routers(model)[0], torch.randn(5, 32)
    expected = module(x)
    found = torch.compile(module, backend="eager", fullgraph=True)(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(fused) == 1


SAID = {
    ("qwen3_moe", "bf16"): "2 of 2 routers",
    ("deepseek_v3", "no"): "2 of 2 routers",
    ("deepseek_v3", "bf16"): "0 of 2 routers: DeepseekV3TopkRouter stays under autocast",
    ("gemma4", "no"): "0 of 2 routers: Gemma4TextRouter of its own kind stays",
    ("jamba", "no"): "routers inside of their blocks stay",
}


@pytest.mark.parametrize(("family", "precision"), SAID, ids=" ".join)
def test_the_report_says_which_routers_are_fused(family, precision, monkeypatch):
    monkeypatch.setattr(block, "fuse_rotations", lambda model: False)  # of a file that other tests use
    model = build_tiny(family)
    said = SAID[family, precision]
    if family == "jamba" and routers(model):  # in transformers 5.24, not in 5.17
        said = "2 of 2 routers"
    found = block.install(model, torch.device("cuda"), precision)
    assert found.reason.endswith(f", rotary embeddings of their own kind stay, {said}")
