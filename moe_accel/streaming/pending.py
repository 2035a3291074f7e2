"""A parameter whose values are still in the checkpoint: it has a shape, a dtype and a `Source`, and no memory.

To ask for its shape, its dtype or whether it needs a gradient reads nothing, nor does to cast it, to move it to a GPU
(it is read there), to copy it or to assign it. Whatever else touches it reads it first, on the CPU, and makes it an
ordinary parameter: the same Python object, so that ties, optimizers and adapters keep their references. So a model is
right whatever a script does with it between `from_pretrained` and `prepare`; what it touches costs memory.

The same class traces what transformers does to the tensors of a checkpoint before they become parameters: stacks,
concatenations, cuts and transposes become sources; anything else becomes a `Call`, computed when it is read.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from moe_accel.streaming.source import Call, Cut, Joined, Source, Transposed, cast, part_jobs, read_whole
from moe_accel.streaming.source import fill as fill_jobs

COMPARED_BYTES = 64 << 20


class Pending(Tensor):
    """A tensor on the CPU, as far as it says, that has no values yet."""

    source: Source
    address: int

    @staticmethod
    def of(source: Source, requires_grad: bool = False) -> "Pending":
        """A tensor that stands for `source`."""
        made: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            Pending, torch.Size(source.shape), dtype=source.dtype, device=torch.device("cpu")
        )
        made.source = source
        made.address = next(_addresses)
        if requires_grad:
            made.requires_grad_()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _METADATA or (name in ("__get__", "__set__") and getattr(func, "__self__", None) in _ATTRIBUTES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        pending = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Pending)]
        if not any(is_parameter(each) for each in pending) and not name.endswith("_"):
            result = _traced_call(func, args, kwargs)
            if result is not NotImplemented:
                return result
        for each in dict.fromkeys(pending):
            materialise(each)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """For what reaches C++ past `__torch_function__`: metadata ops give a stand-in, values are read."""
        if func is torch.ops.aten.detach.default:
            return _same(args[0], Pending.of(args[0].source))
        values = tree_map_only(Pending, lambda each: read_whole(each.source), (args, kwargs or {}))
        return func(*values[0], **values[1])

    def data_ptr(self) -> int:
        """A number that no other tensor has: accelerate tells the parameters of an optimizer apart by it."""
        return self.address

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pending":
        copied = _same(self, Pending.of(self.source))
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Pending(shape={tuple(self.shape)}, dtype={self.dtype}, not read yet)"


_addresses = itertools.count(-(1 << 62), -1)

_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_signed,
    Tensor.is_contiguous,
    Tensor.stride,
    Tensor.requires_grad_,
    Tensor.get_device,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What is answered, or set, without values."""

_ATTRIBUTES = [
    getattr(Tensor, name)
    for name in (
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "nbytes",
        "itemsize",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mps",
        "is_xpu",
        "names",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_version",
    )
    if hasattr(Tensor, name)
]


def is_pending(value: Any) -> bool:
    """Whether the values of a tensor are still to be read."""
    return isinstance(value, Pending)


def is_parameter(value: Tensor) -> bool:
    """Whether a pending tensor stands in a model, and is no mere intermediate of a conversion."""
    return bool(vars(value).get("_is_param"))


def pending_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Pending]]:
    """(module, name, parameter) of what is still to be read; a tied parameter once for every place it has."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Pending):
                yield module, name, parameter


def materialise(pending: Pending) -> None:
    """Read the values: the same Python object is an ordinary tensor, or parameter, afterwards."""
    real = read_whole(pending.source)
    become(pending, real)


def become(pending: Pending, real: Tensor) -> None:
    """Make a pending tensor be `real`, by exchanging what the two Python objects hold; `real` must have no other user.

    Raises:
        RuntimeError: by torch, where C++ code or a weak reference holds the tensor.
    """
    requires_grad, marks = pending.requires_grad, _marks(pending)
    if is_parameter(pending):
        real = nn.Parameter(real, requires_grad=requires_grad)
    torch.utils.swap_tensors(pending, real)
    vars(pending).update(marks)


def _marks(pending: Tensor) -> dict[str, Any]:
    """What others have noted on a tensor, such as transformers' `_is_hf_initialized`."""
    return {name: value for name, value in vars(pending).items() if name not in ("source", "address", "_is_param")}


def _same(pending: Pending, other: Pending) -> Pending:
    """`other` as a parameter where `pending` is one, with its marks."""
    vars(other).update(_marks(pending))
    if is_parameter(pending):
        vars(other)["_is_param"] = True
        other.requires_grad_(pending.requires_grad)
    return other


def _dim(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _sources(tensors: Any) -> list[Any] | None:
    """The sources of tensors that are all pending and no parameters, of one dtype."""
    if not all(isinstance(each, Pending) and not is_parameter(each) for each in tensors):
        return None
    found = [each.source for each in tensors]
    return found if found and len({each.dtype for each in found}) == 1 else None


def _stack(tensors: Any, dim: int = 0) -> Any:
    sources = _sources(tensors)
    if sources is None or len({each.shape for each in sources}) != 1:
        return NotImplemented
    shape = sources[0].shape
    dim = _dim(dim, len(shape) + 1)
    return Pending.of(Joined(tuple(sources), dim, True, (*shape[:dim], len(sources), *shape[dim:]), sources[0].dtype))


def _cat(tensors: Any, dim: int = 0) -> Any:
    sources = _sources(tensors)
    if sources is None:
        return NotImplemented
    shape = sources[0].shape
    dim = _dim(dim, len(shape))
    others = {(*each.shape[:dim], *each.shape[dim + 1 :]) for each in sources}
    if len(others) != 1 or any(len(each.shape) != len(shape) for each in sources):
        return NotImplemented
    total = sum(each.shape[dim] for each in sources)
    return Pending.of(Joined(tuple(sources), dim, False, (*shape[:dim], total, *shape[dim + 1 :]), sources[0].dtype))


def _traces(tensor: Any) -> bool:
    return isinstance(tensor, Pending) and not is_parameter(tensor)


def _transpose(tensor: Any, dim0: int, dim1: int) -> Any:
    if not _traces(tensor):
        return NotImplemented
    shape = list(tensor.source.shape)
    dim0, dim1 = _dim(dim0, len(shape)), _dim(dim1, len(shape))
    shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
    return Pending.of(Transposed(tensor.source, dim0, dim1, tuple(shape), tensor.source.dtype))


def _chunk(tensor: Any, chunks: int, dim: int = 0) -> Any:
    if not _traces(tensor):
        return NotImplemented
    shape = tensor.source.shape
    dim = _dim(dim, len(shape))
    size = -(-shape[dim] // chunks)
    starts = range(0, shape[dim], size)
    return tuple(
        Pending.of(
            Cut(
                tensor.source,
                dim,
                start,
                (*shape[:dim], min(size, shape[dim] - start), *shape[dim + 1 :]),
                tensor.source.dtype,
            )
        )
        for start in starts
    )


def _getitem(tensor: Any, index: Any) -> Any:
    return tensor if _traces(tensor) and index is Ellipsis else NotImplemented


def _unchanged(tensor: Any, **_: Any) -> Any:
    return tensor if _traces(tensor) else NotImplemented


def _detach(tensor: Any) -> Any:
    return Pending.of(tensor.source) if _traces(tensor) else NotImplemented


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.to`: a cast stays pending, a move to another device reads there, into a new tensor."""
    if not isinstance(tensor, Pending):
        return NotImplemented
    copy = kwargs.pop("copy", False)
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    if device is not None and device.type == "meta":
        return torch.empty(tensor.source.shape, dtype=dtype or tensor.source.dtype, device="meta")
    if device is not None and device.type != "cpu":
        return read_whole(cast(tensor.source, dtype or tensor.source.dtype), device)
    if dtype is None or dtype == tensor.source.dtype:
        return NotImplemented if copy else tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return NotImplemented  # the cast belongs to a graph
    return Pending.of(cast(tensor.source, dtype))


def _caster(dtype: torch.dtype) -> Callable:
    return lambda tensor, *_, **__: _to(tensor, dtype)


def _cuda(tensor: Any, device: Any = None, *_: Any, **__: Any) -> Any:
    index = torch.cuda.current_device() if device is None else device
    return _to(tensor, torch.device("cuda", index) if isinstance(index, int) else torch.device(index))


def _set_data(tensor: Any, value: Any) -> Any:
    """`tensor.data = value`, as `Module.to` does it to every parameter."""
    if not isinstance(tensor, Pending) or value is tensor:
        return None if value is tensor else NotImplemented
    if isinstance(value, Pending):
        vars(tensor)["source"], old = value.source, tensor.source
        if old.dtype != value.source.dtype or old.shape != value.source.shape:
            torch.utils.swap_tensors(tensor, _same(tensor, Pending.of(value.source)))
        return None
    become(tensor, value.detach())
    return None


def _may_set_data(tensor: Any, _: Any) -> Any:
    """What `Module.to` asks before it sets `tensor.data`, instead of a new parameter that would undo ties."""
    return True if isinstance(tensor, Pending) else NotImplemented


def _equal(first: Any, second: Any) -> Any:
    """`torch.equal`, block by block: transformers compares weights that may be tied."""
    if not (isinstance(first, Pending) and isinstance(second, Pending)):
        return NotImplemented
    one, other = first.source, second.source
    if one.shape != other.shape or one.dtype != other.dtype or not one.shape:
        return NotImplemented
    row_bytes = max(1, first.numel() // max(1, one.shape[0])) * one.dtype.itemsize
    step = max(1, COMPARED_BYTES // row_bytes)
    for start in range(0, one.shape[0], step):
        part = ((start, min(one.shape[0], start + step)), *((0, size) for size in one.shape[1:]))
        blocks = [torch.empty([high - low for low, high in part], dtype=one.dtype) for _ in range(2)]
        for source, block in zip((one, other), blocks, strict=True):
            fill_jobs(part_jobs(source, part, block))
        if not torch.equal(*blocks):
            return False
    return True


_HANDLERS: dict[Any, Callable] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
    Tensor.__getitem__: _getitem,
    Tensor.contiguous: _unchanged,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.to: _to,
    Tensor.float: _caster(torch.float32),
    Tensor.half: _caster(torch.float16),
    Tensor.bfloat16: _caster(torch.bfloat16),
    Tensor.double: _caster(torch.float64),
    Tensor.cuda: _cuda,
    Tensor.data.__set__: _set_data,  # pyright: ignore[reportAttributeAccessIssue]
    torch._has_compatible_shallow_copy_type: _may_set_data,  # pyright: ignore[reportPrivateImportUsage]
    torch.equal: _equal,
    Tensor.equal: _equal,
}


def _traced_call(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other function of pending tensors that gives tensors: what it gives is computed when it is read."""

    def on_meta(each: Pending) -> Tensor:
        return torch.empty(each.source.shape, dtype=each.source.dtype, device="meta")

    meta_args, meta_kwargs = tree_map_only(Pending, on_meta, (args, kwargs))
    try:
        shapes = func(*meta_args, **meta_kwargs)
    except (RuntimeError, NotImplementedError):
        return NotImplemented  # it needs values, or is wrong: which of both shows when it gets them
    outputs = [shapes] if isinstance(shapes, Tensor) else shapes
    if not isinstance(outputs, list | tuple) or not all(isinstance(each, Tensor) and each.is_meta for each in outputs):
        return NotImplemented

    def compute(number: int) -> Tensor:
        real_args, real_kwargs = tree_map_only(Pending, lambda each: read_whole(each.source), (args, kwargs))
        result = func(*real_args, **real_kwargs)
        return result if isinstance(result, Tensor) else result[number]

    made = [
        Pending.of(Call(lambda number=number: compute(number), tuple(each.shape), each.dtype))
        for number, each in enumerate(outputs)
    ]
    return made[0] if isinstance(shapes, Tensor) else type(outputs)(made)
