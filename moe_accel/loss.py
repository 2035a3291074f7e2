"""Training on `labels=` without ever holding all logits.

While a model in training is called with labels, its output layer hands on `DeferredLogits`: hidden states and weight,
not yet multiplied. Transformers' loss calls `float()`, `view()` and `cross_entropy` on them, which is answered by
`linear_cross_entropy`. Whoever does anything else with them gets the logits: computed then, as usual, and kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._pytree import register_pytree_node

from moe_accel.kernels.cross_entropy import linear_cross_entropy
from moe_accel.kernels.device import as_autocast, autocast_dtype
from moe_accel.padding.rows import Rows
from moe_accel.report import Choice
from moe_accel.swap import become, own_class


def install(model: nn.Module, precision: str = "no") -> Choice:
    """Let the output layer of a transformers model defer its logits; returns what was chosen and why.

    Args:
        model: of transformers.
        precision: accelerate's `mixed_precision`.
    """
    head = _head(model) if hasattr(model, "get_output_embeddings") else None
    if head is None or own_class(head) is not nn.Linear:
        return Choice("native", f"the output layer is {'missing' if head is None else type(head).__name__}")
    if head.bias is not None:
        return Choice("native", "the output layer has a bias")
    if precision == "fp16" or head.weight.dtype == torch.float16:
        return Choice("native", "fp16 would lose small gradients before a GradScaler multiplies them")
    if "forward" in vars(head):
        return Choice("native", "somebody else replaced the output layer's forward")
    if not isinstance(head, _Deferring):
        become(head, _Deferring)
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


class _Deferring(nn.Linear):
    """What the output layer does instead; how, is said for each call of the model."""

    _moe_accel_defer = False

    def forward(self, input: Tensor) -> "Tensor | DeferredLogits":
        """The logits, or what they are made of."""
        # fp16: the gradient of the logits, divided by the number of rows, is computed before backward brings a
        # GradScaler's factor; without the division, the sum over rows that is the weight's gradient could overflow.
        fp16 = (autocast_dtype(input.device) or input.dtype) == torch.float16
        if self._moe_accel_defer and not fp16 and not isinstance(self.weight, DTensor):
            operands = as_autocast(input, self.weight)  # as autocast is now, not where the logits are asked for
            return DeferredLogits(*_Pass.apply(*operands))  # pyright: ignore[reportGeneralTypeIssues]
        return functional.linear(input, self.weight)


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
    """`hidden @ weight.T`, computed when somebody asks for it, and from then on what was computed.

    A dataclass of tensors, and known to pytree, so that FSDP2 finds the tensors in what a layer puts out. Where it
    casts them, the logits are meant.

    Attributes:
        hidden: [..., H].
        weight: [V,H].
        cast: dtype of the logits, where `float()` or a cast changed it; None: what the product has.
        computed: dtype of hidden and weight.
        source: what this is a view of, its leading dimensions joined.
        rows: where the tokens of hidden stand in the batch, whose padding was not computed; None: it is the batch.
        kept: the logits [..., V], once somebody asked.
    """

    hidden: Tensor
    weight: Tensor
    cast: torch.dtype | None = None
    computed: torch.dtype | None = None
    source: "DeferredLogits | None" = None
    rows: Rows | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if self.computed is not None and self.hidden.dtype != self.computed:
            self.cast = self.hidden.dtype
            self.hidden, self.weight = self.hidden.to(self.computed), self.weight.to(self.computed)
        self.computed = self.hidden.dtype

    def tensor(self) -> Tensor:
        """The logits [..., V]: the same tensor each time, so that what is written to them stays.

        Raises:
            RuntimeError: FSDP has taken the weight apart since; ask right after forward.
        """
        if self.kept is None:
            # like logits that forward computed, whatever holds where they are asked for
            with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                self.kept = self._product() if self.source is None else self.source.tensor().view(self.shape)
        return self.kept

    def _product(self) -> Tensor:
        if self.weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the logits were not computed with the loss, and FSDP has taken the output layer's weight apart since; "
                "ask for them before the next forward, or set kernels: reference"
            )
        logits = functional.linear(self._spread(), self.weight)
        return logits if self.cast is None else logits.to(self.cast)

    def _spread(self) -> Tensor:
        """Hidden states of the batch: zeros for padding, of which the logits are zeros."""
        return self.hidden if self.rows is None else self.rows.put_batch(self.hidden)

    def padded(self, rows: Rows) -> "Tensor | DeferredLogits":
        """Of the tokens [1,N] of a batch: the logits [B,T,V], zeros for padding, deferred still."""
        known = self.known()
        if known is not None:
            return rows.put_batch(known)
        return DeferredLogits(self.hidden, self.weight, self.cast, rows=rows)

    def known(self) -> Tensor | None:
        """The logits, if they are computed already."""
        if self.kept is None and self.source is not None and self.source.known() is not None:
            return self.tensor()
        return self.kept

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        leading = self.hidden.shape[:-1] if self.rows is None else (self.rows.batch, self.rows.length)
        return torch.Size((*leading, self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.cast or self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """Of the logits."""
        return self.hidden.requires_grad or self.weight.requires_grad

    def float(self) -> "Tensor | DeferredLogits":
        """The same in fp32, still deferred."""
        known = self.known()
        if known is not None:
            return known.float()
        same = self.dtype == torch.float32
        return self if same else DeferredLogits(self.hidden, self.weight, torch.float32, rows=self.rows)

    def to(self, *args: Any, **kwargs: Any) -> "Tensor | DeferredLogits":
        """As of a tensor; deferred still in the same dtype and in fp32."""
        same = torch.empty(0, dtype=self.dtype, device=self.device)
        asked = same.to(*args, **kwargs)
        if asked is same:
            return self
        if asked.device == self.device and asked.dtype == torch.float32 != self.dtype:
            return self.float()
        return self.tensor().to(*args, **kwargs)

    def view(self, *shape: Any) -> "Tensor | DeferredLogits":
        """Deferred still where only leading dimensions are joined: `view(-1, V)`."""
        if shape == (-1, self.weight.shape[0]) and self.known() is None:
            joined = self._spread().reshape(-1, self.hidden.shape[-1])
            return DeferredLogits(joined, self.weight, self.cast, source=self)
        return self.tensor().view(*shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for what is not there
            raise AttributeError(name)
        if name in _OF_ANY_VALUES:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        return getattr(self.hidden if name in _OF_DEVICE else self.tensor(), name)

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


_OF_ANY_VALUES = {"size", "ndim", "dim", "numel", "nelement", "stride", "is_contiguous", "element_size"}
_OF_ANY_VALUES |= {"itemsize", "nbytes", "is_floating_point", "is_complex"}
_OF_DEVICE = {"is_cuda", "is_cpu", "get_device", "layout"}


def _flatten(logits: DeferredLogits) -> tuple[list[Tensor], Any]:
    known = logits.known()
    return (
        ([logits.hidden, logits.weight], (logits.cast, logits.computed, None, logits.rows))
        if known is None
        else ([known], None)
    )


def _unflatten(tensors: Any, context: Any) -> "Tensor | DeferredLogits":
    return tensors[0] if context is None else DeferredLogits(*tensors, *context)


register_pytree_node(DeferredLogits, _flatten, _unflatten)


def _computed(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.tensor()
    return type(value)(map(_computed, value)) if type(value) in (list, tuple) else value


def _operator(name: str) -> Any:
    def operate(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*_computed(others))

    return operate


_ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul", "pow", "radd", "rsub", "rmul", "rtruediv", "neg", "abs")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
for _name in (*_ARITHMETIC, *_IN_PLACE, "getitem", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`functional.cross_entropy` of deferred logits; None where it asks for more than the kernel knows."""
    deferred = isinstance(input, DeferredLogits) and input.known() is None
    plain = deferred and input.hidden.ndim == 2 and isinstance(target, Tensor) and target.shape == input.shape[:1]
    if not plain or target.dtype != torch.int64 or reduction not in ("mean", "sum"):
        return None
    if weight is not None or label_smoothing or not (size_average is None and reduce is None):
        return None
    divisor = torch.ones((), device=input.device) if reduction == "sum" else None
    with torch.autocast(input.device.type, enabled=False):
        return linear_cross_entropy(input.hidden, input.weight, target.to(input.device), divisor, ignore_index)
