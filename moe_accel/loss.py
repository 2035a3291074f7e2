"""Training on `labels=` without ever holding all logits.

While a model in training is called with labels, its output layer hands on `DeferredLogits`: hidden states and weight,
not yet multiplied. Transformers' loss calls `float()`, `view()` and `cross_entropy` on them, which is answered by
`linear_cross_entropy`. Whoever does anything else with them gets the logits: they are computed then, as usual.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._pytree import register_pytree_node

from moe_accel.kernels.cross_entropy import linear_cross_entropy
from moe_accel.kernels.device import as_autocast, autocast_dtype
from moe_accel.report import Choice


def install(model: nn.Module, precision: str = "no") -> Choice:
    """Let the output layer of a transformers model defer its logits; returns what was chosen and why.

    Args:
        model: of transformers.
        precision: accelerate's `mixed_precision`.
    """
    head = _head(model) if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return Choice("native", f"the output layer is {'missing' if head is None else type(head).__name__}")
    if head.bias is not None:
        return Choice("native", "the output layer has a bias")
    if precision == "fp16" or head.weight.dtype == torch.float16:
        return Choice("native", "fp16 would lose small gradients before a GradScaler multiplies them")
    if "forward" not in vars(head):
        head._moe_accel_defer = False  # pyright: ignore[reportArgumentType]
        head.forward = types.MethodType(_forward, head)
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)
    return Choice("fused", "output layer and cross-entropy together, never all logits, where labels are given")


def _before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    wanted = model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
    _head(model)._moe_accel_defer = wanted and not torch.compiler.is_compiling()


def _after(model: nn.Module, args: Any, output: Any) -> None:
    _head(model)._moe_accel_defer = False


def _head(model: nn.Module) -> Any:
    return model.get_output_embeddings()  # pyright: ignore[reportCallIssue]


def _forward(head: Any, hidden: Tensor) -> "Tensor | DeferredLogits":
    # The gradient of the logits, divided by the number of rows, is computed before backward brings a GradScaler's
    # factor; without the division, the sum over rows that is the weight's gradient could overflow.
    fp16 = (autocast_dtype(hidden.device) or hidden.dtype) == torch.float16
    if head._moe_accel_defer and not fp16 and not isinstance(head.weight, DTensor):
        return DeferredLogits(*_Pass.apply(hidden, head.weight))  # pyright: ignore[reportGeneralTypeIssues]
    return functional.linear(hidden, head.weight)


class _Pass(torch.autograd.Function):
    """Hidden states and weight as outputs of the output layer.

    FSDP2 gathers a layer for backward when the gradient of one of its outputs comes; without this, the gradients of
    hidden states and weight would come to a layer that is not there. What is frozen stays so: no gradient is computed
    for it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        passed = hidden.view_as(hidden), weight.view_as(weight)
        ctx.set_materialize_grads(False)
        frozen = [one for one, wanted in zip(passed, ctx.needs_input_grad, strict=True) if not wanted]
        ctx.mark_non_differentiable(*frozen)
        return passed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


@dataclass(eq=False)
class DeferredLogits:
    """`hidden @ weight.T`, computed when somebody asks for it.

    A dataclass of tensors, and known to pytree, so that FSDP2 finds the tensors in what a layer puts out. Where it
    casts them, the logits are meant.

    Attributes:
        hidden: [..., H].
        weight: [V,H].
        cast: dtype of the logits, where `float()` or a cast changed it; None: what the product has.
        computed: dtype of hidden and weight.
    """

    hidden: Tensor
    weight: Tensor
    cast: torch.dtype | None = None
    computed: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.computed is not None and self.hidden.dtype != self.computed:
            self.cast = self.hidden.dtype
            self.hidden, self.weight = self.hidden.to(self.computed), self.weight.to(self.computed)
        self.computed = self.hidden.dtype

    def tensor(self) -> Tensor:
        """The logits [..., V].

        Raises:
            RuntimeError: FSDP has taken the weight apart since; ask right after forward.
        """
        if self.weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the logits were not computed with the loss, and FSDP has taken the output layer's weight apart since; "
                "ask for them before the next forward, or set kernels: reference"
            )
        logits = functional.linear(self.hidden, self.weight)
        return logits if self.cast is None else logits.to(self.cast)

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.cast or autocast_dtype(self.device) or self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.hidden.device

    def float(self) -> "DeferredLogits":
        """The same in fp32, still deferred."""
        return DeferredLogits(self.hidden, self.weight, torch.float32)

    def view(self, *shape: Any) -> "Tensor | DeferredLogits":
        """Deferred still where only leading dimensions are joined: `view(-1, V)`."""
        if shape == (-1, self.weight.shape[0]):
            return DeferredLogits(self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.cast)
        return self.tensor().view(*shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for what is not there
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, function: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        return function(*_computed(args), **{name: _computed(value) for name, value in kwargs.items()})


def _flatten(logits: DeferredLogits) -> tuple[list[Tensor], Any]:
    return [logits.hidden, logits.weight], (logits.cast, logits.computed)


def _unflatten(tensors: Any, context: Any) -> DeferredLogits:
    return DeferredLogits(*tensors, *context)


register_pytree_node(DeferredLogits, _flatten, _unflatten)


def _computed(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.tensor()
    return type(value)(map(_computed, value)) if type(value) in (list, tuple) else value


def _operator(name: str) -> Any:
    def operate(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*_computed(others))

    return operate


_ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul", "pow", "radd", "rsub", "rmul", "rtruediv", "neg")
for _name in (*_ARITHMETIC, "getitem", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


def _cross_entropy(input: Any, target: Any, weight: Any = None, **options: Any) -> Tensor | None:
    """`functional.cross_entropy` of deferred logits; None where it asks for more than the kernel knows."""
    reduction, ignore_index = options.pop("reduction", "mean"), options.pop("ignore_index", -100)
    plain = isinstance(input, DeferredLogits) and input.hidden.ndim == 2 and isinstance(target, Tensor)
    if not plain or weight is not None or target.is_floating_point() or reduction not in ("mean", "sum"):
        return None
    if any(options.values()):  # label_smoothing
        return None
    hidden, matrix = as_autocast(input.hidden, input.weight)
    divisor = torch.ones((), device=hidden.device) if reduction == "sum" else None
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_cross_entropy(hidden, matrix, target.to(hidden.device), divisor, ignore_index)
