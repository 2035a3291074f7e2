"""What a recorded call depends on: what it was given, and the module as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_accel.padding.attention import Packed
from moe_accel.swap import is_bare

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Unusual(Exception):
    """A call that is not recorded."""


class Given(NamedTuple):
    """What a call was given: its tensors, and all else as one value that can be compared.

    Attributes:
        tensors: in the order in which they stand.
        kind: the structure around them with their shapes and dtypes, and the state of torch that matters.
        autocast: whether it is on, and its dtype.
        stream: the GPU's, that it is computed on.
    """

    tensors: list[Tensor]
    kind: tuple[Any, ...]
    autocast: tuple[bool, torch.dtype]
    stream: int | None


def given(device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Take a call apart.

    Raises:
        Unusual: something in it is neither a tensor on this device nor plain, or is a mask.
    """
    if isinstance(kwargs.get("attention_mask"), Tensor):
        raise Unusual("a mask")
    tensors: list[Tensor] = []
    kind = kind_of((args, tuple(kwargs.items())), tensors)
    autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    stream, device = None, torch.device(device_type)
    if device_type == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
        device = torch.device(device_type, torch.cuda.current_device())
    if any(each.device != device for each in tensors):
        raise Unusual("tensors on another device")
    return Given(tensors, (kind, autocast, stream, _how_to_compute()), autocast, stream)


def _how_to_compute() -> tuple[Any, ...]:
    """What is set of torch that chooses between kernels."""
    cuda = torch.backends.cuda
    attention = cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return *attention, cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()


def kind_of(value: Any, tensors: list[Tensor]) -> Any:
    """All of a structure but its tensors, which are put into the list.

    Raises:
        Unusual: something in it is neither a tensor nor plain.
    """
    if type(value) in (Tensor, nn.Parameter):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if type(value) in (tuple, list):
        return type(value), *(kind_of(each, tensors) for each in value)
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Packed):  # of the same lengths: the same
        return Packed, tuple(value.rows.lengths), value.window
    raise Unusual(type(value).__name__)


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of `kind_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    return type(value)(with_tensors(each, tensors) for each in value) if type(value) in (tuple, list) else value


def packed_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Packed]:
    """The masks of packed sequences of a call, which `kind_of` tells by their lengths."""
    return [each for each in (*args, *kwargs.values()) if isinstance(each, Packed)]


class Watched:
    """A module as it was, and whether it still is: parts, tensors and where they are, plain attributes, no hooks.

    It holds nothing that refers to the module, which has this.
    """

    def __init__(self, module: nn.Module):
        parts = list(module.modules())
        self._inside = parts[1:]
        self._kinds = [type(part) for part in parts]
        self._parts = [(part._modules, dict(part._modules)) for part in parts]
        held: list[dict[str, Any]] = [tensors for part in parts for tensors in (part._parameters, part._buffers)]
        slots = [(tensors, name, each) for tensors in held for name, each in tensors.items() if each is not None]
        self._tensors = [(tensors, name, each, each.data_ptr(), each.requires_grad) for tensors, name, each in slots]
        self._implementation = _implementation(module)
        self._values: list[_Place] = []
        self._dicts: list[_Place] = []
        for part in parts:
            own = None if part is module else vars(part)
            self._values += _plain(own, vars(part))
            self._dicts += [(own, key, value) for key, value in vars(part).items() if type(value) is dict]

    def problem(self) -> str | None:
        """Why this must not be recorded; None: it may be."""
        if not all(map(is_bare, self._inside)):
            return "hooks, or another forward, inside of attention"
        for _, _, each, _, _ in self._tensors:
            if type(each) not in (Tensor, nn.Parameter):
                return f"a parameter of type {type(each).__name__}"
        for held, key, value in self._values:
            of_module = key == "p" and held is not None and "inplace" in held  # nn.Dropout
            if isinstance(value, float) and value and ("dropout" in key or of_module):
                return "dropout"
        return None

    def trained(self) -> list[Tensor]:
        """The parameters that want a gradient, each once."""
        found = {id(each): each for _, _, each, _, wants in self._tensors if wants}
        return list(found.values())

    @contextmanager
    def replaced(self, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """The module with other tensors in place of some of its own."""
        places = [(held, name, one) for held, name, one, _, _ in self._tensors if one in tensors]
        for held, name, one in places:
            held[name] = tensors[one]
        try:
            yield
        finally:
            for held, name, one in places:
                held[name] = one

    def is_same(self, module: nn.Module) -> bool:
        """Whether nothing of it changed."""
        own = vars(module)
        return (
            [type(module), *map(type, self._inside)] == self._kinds
            and all(map(is_bare, self._inside))
            and all(held == parts for held, parts in self._parts)
            and all(
                held.get(name) is one and one.data_ptr() == at and one.requires_grad is wants
                for held, name, one, at, wants in self._tensors
            )
            and all((own if held is None else held).get(key) is value for held, key, value in self._dicts)
            and all((own if held is None else held).get(key, self) == value for held, key, value in self._values)
            and _implementation(module) == self._implementation
        )


_Place = tuple[dict[str, Any] | None, str, Any]
"""A dict, None for the attributes of the module itself; a key; what was there."""


def _implementation(module: Any) -> Any:
    """Of attention, as transformers looks it up at every call."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _plain(place: dict[str, Any] | None, held: dict[str, Any]) -> Iterator[_Place]:
    """What is plain in a dict, or a list of such, with where it is; in the dicts in it, too."""
    for key, value in held.items():
        if isinstance(value, PLAIN):
            yield place, key, value
        elif isinstance(value, list) and all(isinstance(each, PLAIN) for each in value):
            yield place, key, list(value)
        elif type(value) is dict:
            yield from _plain(value, value)
