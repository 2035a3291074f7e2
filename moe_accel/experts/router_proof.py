"""What a router computes, found by trying and never by the name of a class.

A copy of the router with its own class and numbers and random weights, and every rule of `kernels/router.py` that these
numbers allow get the same tokens on the CPU. Logits must have the same bits, experts must be the same, weights and
gradients as near as rounding lets them be; in training and in evaluation, and in each mix of dtypes by itself: a router
that rounds its scores on the way (sigmoids of bf16 logits, as under autocast) is not ours there.

Sizes: N tokens, H hidden, E experts, K top-k, G groups of experts.
"""

import copy
import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.experts.router import Dtypes, Logits, Proof, install, proof_of
from moe_accel.kernels.router import Rule, fits, route_torch
from moe_accel.swap import own_class

NUM_TOKENS, WIDTH = 16, 64
"""Of the tokens of a proof: N, and H where the router's own is larger."""
EPSILONS = (0.0, 1e-20, 1e-6)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

_proven: dict[Any, tuple[Proof | None, Any]] = {}
"""Of every kind of router seen, with what its key refers to: there are many modules of a kind."""


def fuse_router(module: nn.Module, function: Any = None) -> Proof | None:
    """Let one router compute with the kernels, or another `function` of their contract, if it does what they do;
    returns what that is."""
    proof = proof_of(module)
    if proof is None and "forward" not in vars(module):
        proof = prove(module)
    if proof is not None:
        install(module, proof, function)
    return proof


def prove(module: nn.Module) -> Proof | None:
    """What a router computes; None if that is not a linear layer and a rule of the kernels."""
    plain = {name for name, _ in _numbers(module)} | set(vars(nn.Module()))
    others = [each for name, each in vars(module).items() if name not in plain]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = tuple((name, tuple(each.shape)) for name, each in tensors)
    kind = own_class(module), _numbers(module), shapes, *map(type, module.children()), *map(id, others)
    if kind not in _proven:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            _proven[kind] = _prove(module), others
    return _proven[kind][0]


def _numbers(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What is set on a module that a rule may depend on."""
    plain = (bool, int, float, str)
    internal = vars(nn.Module())
    return tuple((name, each) for name, each in vars(module).items() if type(each) in plain and name not in internal)


def _prove(module: nn.Module) -> Proof | None:
    forms = list(_forms(module))
    takes = inspect.signature(own_class(module).forward).parameters.values()
    usual = all(each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty for each in takes)
    if not forms or not usual or len(takes) not in (2, 3):
        return None
    num_experts, width = forms[0].weight(module).shape
    narrow = min(width, WIDTH) if width != num_experts else width
    if num_experts < 2 or narrow < NUM_TOKENS // 2:
        return None
    small = _copied(module, {width: narrow})
    given = _Given(num_experts, narrow, takes_bias=len(takes) == 3)
    exact = [each for ndim in (2, 3) if (each := _Try(small, forms[0], given, (FP32, FP32, None, ndim))).runs]
    if not exact:
        return None
    tries = exact + [_Try(small, forms[0], given, (*each, one.dtypes[3])) for one in exact for each in MIXES]
    tries = [each for each in tries if each.runs]
    form = next((form for form in forms if all(each.agrees(form) for each in tries)), None)
    if form is None:
        return None
    for correction, rule in _candidates(module, exact[0]):
        if fits(rule, num_experts) and all(each.computes(form, rule, correction) for each in exact):
            held = {each.dtypes: each.dtype for each in tries if each.computes(form, rule, correction)}
            return Proof(form, rule, correction, exact[0].order, held, _numbers(module))
    return None


MIXES = [
    *((dtype, dtype, None) for dtype in (BF16, FP16)),
    *((dtype, FP32, None) for dtype in (BF16, FP16)),
    *((x, weight, cast) for cast in (BF16, FP16) for x, weight in product((FP32, cast), repeat=2)),
]
"""Dtypes of tokens and weights, and of autocast, in which models are trained; fp32 aside."""


def _forms(module: Any) -> Iterator[Logits]:
    """The linear layers that a router may have: its own weight, or the one module in it."""
    children = dict(module.named_children())
    weight = getattr(module, "weight", None)
    if not children and isinstance(weight, Tensor) and weight.ndim == 2:
        bias = getattr(module, "bias", None) is not None
        for cast, then in product(("", "weight", "fp32"), (False, True)):
            yield Logits(None, bias, cast, then)
    elif len(children) == 1 and weight is None:
        ((name, child),) = children.items()
        if type(child) is nn.Linear:
            yield from (Logits(name, False, cast, then) for cast, then in product(("", "weight"), (False, True)))


def _candidates(module: nn.Module, seen: "_Try") -> Iterator[tuple[str | None, Rule]]:
    """What may be added to scores, and the rules that the numbers on a module allow."""
    top_k, num_experts = seen.weights.shape[1], seen.logits.shape[1]
    numbers = {float(each) for _, each in _numbers(module) if type(each) in (int, float) and each > 0}
    scales = sorted({1.0, 1.0 / top_k, *numbers})
    whole = sorted(int(each) for each in numbers if each == int(each))
    groups = [(1, 1)] + [(n, t) for n, t in product(whole, repeat=2) if t < n < num_experts and num_experts % n == 0]
    tensors = [*seen.copied.named_parameters(), *seen.copied.named_buffers()]
    own = [name for name, each in tensors if each.shape == (num_experts,) and name != "bias"]
    corrections = [None, *own, *([""] if seen.extra else [])]
    for renormalise, scale in product((False, True), scales):
        yield None, Rule(top_k, False, renormalise, scale)
        for correction, (n, t), epsilon in product(corrections, groups, EPSILONS if renormalise else (0.0,)):
            yield correction, Rule(top_k, True, renormalise, scale, epsilon, n, t)


class _Given:
    """Random numbers of a proof, in fp32.

    The first N columns of `weight` are logits [N,E]: the tokens that go with it are the rows of the unit matrix. They
    are from -8 to 8, two rows far below, where an epsilon counts; bf16 and fp16 have every bit of them, and no two
    experts of a token the same.
    """

    def __init__(self, num_experts: int, width: int, takes_bias: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        num_tokens = min(NUM_TOKENS, width)
        grid = torch.arange(-256, 257) / 32
        rows = [grid[torch.randperm(len(grid), generator=generator)[:num_experts]] for _ in range(num_tokens - 2)]
        for start in (-16.0, -44.0):
            bits = torch.tensor(start, dtype=BF16).view(torch.int16) + torch.arange(num_experts, dtype=torch.int16)
            rows.append(bits.view(BF16).float()[torch.randperm(num_experts, generator=generator)])
        self.x, self.weight = torch.eye(num_tokens, width), torch.zeros(num_experts, width)
        self.weight[:, :num_tokens] = torch.stack(rows).t()
        self.noise = torch.randn(num_tokens, width, generator=generator)
        self.noise_weight = torch.randn(num_experts, width, generator=generator) * width**-0.5
        self.noise_bias = torch.randn(num_experts, generator=generator)
        self.probe = torch.randn(2, num_tokens, num_experts, generator=generator)
        self.extra = (_below(torch.randn(num_experts, generator=generator)),) if takes_bias else ()


class _Try:
    """A copy of a router whose weights anybody may change, and its outputs and gradients in some dtypes."""

    def __init__(self, module: Any, form: Logits, given: _Given, dtypes: Dtypes) -> None:
        self.dtypes, self.given, self.extra, self.runs = dtypes, given, given.extra, False
        x_dtype, self.weight_dtype, self.autocast, ndim = dtypes
        self.copied = copy.deepcopy(module)
        for each in self.copied.parameters():
            each.data = each.data.to(self.weight_dtype)
        self.owner: Any = self.copied if form.child is None else getattr(self.copied, form.child)
        self.x, self.noise = given.x.to(x_dtype), given.noise.to(x_dtype)
        self.shape = (1, *self.x.shape) if ndim == 3 else self.x.shape
        try:
            self._run()
        except Exception:  # it wants other shapes, dtypes or arguments, or returns others: nothing is proven of these
            return

    def _run(self) -> None:
        buffers = {name: each.clone() for name, each in self.copied.named_buffers()}
        x = self.x.clone()
        self._put(self.given.weight, bias=torch.zeros(()))
        outputs, again = self._original(x), self._original(x, training=False)
        (experts,) = (at for at, each in enumerate(outputs) if each.dtype == torch.int64)
        expected = self.given.weight[:, : len(x)].t()
        logits = next(at for at, each in enumerate(outputs) if at != experts and torch.equal(each.float(), expected))
        self.order = logits, 3 - experts - logits, experts
        self.logits, self.weights, self.experts = (outputs[at].detach() for at in self.order)
        self.dtype, shape = self.weights.dtype, (len(x), self.experts.shape[-1])
        self.gradients = self._gradients(self._original)
        untouched = [(x, self.x), *((each, buffers[name]) for name, each in self.copied.named_buffers())]
        same = all(_same(*each) for each in (*untouched, *zip(outputs, again, strict=True)))
        self.runs = same and len(outputs) == 3 and self.weights.shape == self.experts.shape == shape

    def _original(self, x: Tensor, training: bool = True) -> tuple[Tensor, ...]:
        with self._autocast():
            return self.copied.train(training)(x.view(self.shape), *self.extra)

    def _gradients(self, function: Any) -> tuple[Tensor, ...]:
        """Those of tokens and weights, of a sum over logits and weights in which every expert has its own factor."""
        weight = self._put(self.given.weight, bias=torch.zeros(()))
        x = self.x.detach().requires_grad_()
        with torch.enable_grad():
            outputs = function(x)
            logits, weights, experts = (outputs[at] for at in self.order)
            of_logits, of_weights = self.given.probe
            total = (logits.float() * of_logits).sum()
            total = total + (weights.float() * of_weights.gather(1, experts)).nan_to_num(0).sum()
        return torch.autograd.grad(total, (x, weight))

    def _put(self, weight: Tensor, bias: Tensor) -> nn.Parameter:
        placed = nn.Parameter(weight.to(self.weight_dtype))
        self.owner._parameters["weight"] = placed
        if self.owner._parameters.get("bias") is not None:
            self.owner._parameters["bias"].data[:] = bias
        return placed

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)

    def agrees(self, form: Logits) -> bool:
        """Whether the logits are those of this linear layer, with the same bits where nothing is rounded."""
        try:
            with torch.no_grad(), self._autocast():
                self._put(self.given.weight, bias=torch.zeros(()))
                if not _same(form(self.copied, self.x), self.logits):
                    return False
                self._put(self.given.noise_weight, bias=self.given.noise_bias)
                theirs = self.copied(self.noise.view(self.shape), *self.extra)[self.order[0]]
                return _near(form(self.copied, self.noise), theirs, shares=0.05)
        except RuntimeError:  # these dtypes cannot be multiplied
            return False

    def computes(self, form: Logits, rule: Rule, correction: str | None) -> bool:
        """Whether experts, weights and gradients are those of this rule."""
        proof = Proof(form, rule, correction, self.order, {}, ())
        weights, experts, _ = route_torch(self.logits, proof.bias(self.copied, self.extra), rule, self.dtype)
        if not _same(experts.sort(1).values, self.experts.sort(1).values):
            return False
        if not _near(weights.gather(1, experts.argsort(1)), self.weights.gather(1, self.experts.argsort(1))):
            return False

        def ours(x: Tensor) -> tuple[Tensor, ...]:
            with self._autocast():
                return proof.outputs(self.copied, x, self.extra, self.dtype)

        gradients = self._gradients(ours)
        slack = 1e-4 if self.dtypes[:3] == (FP32, FP32, None) else 0.1
        return all(_within(*each, slack) for each in zip(gradients, self.gradients, strict=True))


def _copied(module: Any, sizes: dict[int, int]) -> Any:
    """A module of the same class and numbers, with other `sizes`, without hooks, with random values on the CPU."""
    made = object.__new__(own_class(module))
    nn.Module.__init__(made)
    internal = set(vars(made))
    for name, each in vars(module).items():
        if name not in internal:
            made.__dict__[name] = sizes.get(each, each) if type(each) is int else copy.copy(each)

    def noise(like: Tensor) -> Tensor:
        shape = [sizes.get(size, size) for size in like.shape]
        return _below(torch.randn(shape)) if like.is_floating_point() else torch.zeros(shape, dtype=like.dtype)

    for name, each in module._parameters.items():
        made._parameters[name] = each if each is None else nn.Parameter(noise(each))
    made._buffers.update({name: each if each is None else noise(each) for name, each in module._buffers.items()})
    made._modules.update({name: each and _copied(each, sizes) for name, each in module._modules.items()})
    return made


def _below(noise: Tensor) -> Tensor:
    """Corrections that make scores negative: a router that puts 0 in place of scores out of reach shows."""
    return noise / 2 - 2.5


def _same(one: Tensor, other: Tensor) -> bool:
    """The same bits, NaN or not."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def _near(ours: Tensor, theirs: Tensor, shares: float = 0.01) -> bool:
    """Whether values differ by roundings: of fp32, or by one of 16 bits in hardly any value."""
    one, other = ours.double(), theirs.double()
    if ours.dtype != theirs.dtype:
        return False
    if theirs.dtype == FP32:
        scale = 0.0 if shares == 0.01 else float(other.abs().max())
        return torch.allclose(one, other, rtol=2e-5, atol=1e-6 * scale, equal_nan=True)
    different = (one != other) & ~(one.isnan() & other.isnan())
    close = torch.allclose(one, other, rtol=2**-7, atol=1e-6, equal_nan=True)
    return close and int(different.sum()) <= max(1, shares * different.numel())


def _within(one: Tensor, other: Tensor, slack: float) -> bool:
    one, other = one.double(), other.double()
    return torch.allclose(one, other, rtol=slack, atol=slack * float(other.nan_to_num(0).abs().max()), equal_nan=True)
