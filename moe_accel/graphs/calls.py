"""What a recorded call depends on: what it was given, and the module as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_accel.graphs import captured
from moe_accel.padding.attention import Packed
from moe_accel.padding.rows import Slots
from moe_accel.swap import HOOKS, is_bare

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
        structure: what it was given: arguments, and pairs of names and arguments.
        masks: of packed sequences among these.
    """

    tensors: list[Tensor]
    kind: tuple[Any, ...]
    autocast: tuple[bool, torch.dtype]
    stream: int | None
    structure: tuple[Any, Any]
    masks: list[Packed]


def given(device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Take a call apart.

    Raises:
        Unusual: something in it is neither a tensor on this device nor plain, or is a mask.
    """
    if isinstance(kwargs.get("attention_mask"), Tensor):
        raise Unusual("a mask")
    tensors: list[Tensor] = []
    structure = args, tuple(kwargs.items())
    masks: list[Packed] = []
    kind = kind_of(structure, tensors, masks)
    autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    stream, device = None, torch.device(device_type)
    if device_type == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
        device = torch.device(device_type, torch.cuda.current_device())
    if any(each.device != device for each in tensors):
        raise Unusual("tensors on another device")
    kind = kind, autocast, stream, captured.is_asked_for(), _how_to_compute()
    return Given(tensors, kind, autocast, stream, structure, masks)


def _how_to_compute() -> tuple[Any, ...]:
    """What is set of torch that chooses between kernels."""
    cuda = torch.backends.cuda
    attention = cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return *attention, cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()


def kind_of(value: Any, tensors: list[Tensor], masks: list[Packed]) -> Any:
    """All of a structure but its tensors, which are put into the list, and masks of packed sequences into the other.

    Raises:
        Unusual: something in it is neither a tensor nor plain.
    """
    if type(value) in (Tensor, nn.Parameter):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if type(value) in (tuple, list):
        return type(value), *(kind_of(each, tensors, masks) for each in value)
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Packed):  # of the same lengths: the same
        masks.append(value)
        return Packed, tuple(value.rows.lengths), value.window
    raise Unusual(type(value).__name__)


def without_sizes(kind: Any) -> Any:
    """What `kind_of` says, without what it says of tensors, and of how long packed sequences are."""
    if type(kind) is not tuple or not kind:
        return kind
    if isinstance(kind[0], torch.Size):
        return Tensor
    return (Packed, kind[2]) if kind[0] is Packed else tuple(map(without_sizes, kind))


def with_tensors(value: Any, tensors: Iterator[Tensor], slots: Slots | None = None) -> Any:
    """The same structure with other tensors, in the order of `kind_of`, and packed sequences in `slots`, if any."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Packed):
        return value if slots is None else Packed(slots, value.window)
    return type(value)(with_tensors(each, tensors, slots) for each in value) if type(value) in (tuple, list) else value


class Watched:
    """A module as it was, and whether it still is: parts, tensors and where they are, plain attributes, no hooks.

    It holds nothing that refers to the module, which has this.
    """

    def __init__(self, module: nn.Module):
        parts = list(module.modules())
        self._inside = parts[1:]
        self._hooks = list(map(_hooks, self._inside))
        self._kinds = [type(part) for part in parts]
        self._parts = [(part._modules, dict(part._modules)) for part in parts]
        held: list[dict[str, Any]] = [tensors for part in parts for tensors in (part._parameters, part._buffers)]
        slots = [(tensors, name, each) for tensors in held for name, each in tensors.items() if each is not None]
        self._tensors = [(tensors, name, each, _address(each), each.requires_grad) for tensors, name, each in slots]
        self._implementation = _implementation(module)
        self._values: list[_Place] = []
        self._dicts: list[_Place] = []
        for part in parts:
            own = None if part is module else vars(part)
            self._values += _plain(own, vars(part))
            self._dicts += [(own, key, value) for key, value in vars(part).items() if type(value) is dict]

    def problem(self, maybe_sharded: bool = False) -> str | None:
        """Why this must not be recorded; None: it may be. `maybe_sharded`: see `is_same`."""
        if None in self._hooks:
            return "hooks, or another forward, inside of it"
        for _, _, each, _, _ in self._tensors:
            is_spread = _is_of_ep(each) or (maybe_sharded and isinstance(each, DTensor))
            if type(each) not in (Tensor, nn.Parameter) and not is_spread:
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

    def is_same(self, module: nn.Module, maybe_sharded: bool = False) -> bool:
        """Whether nothing of it changed.

        Args:
            module: whose it is.
            maybe_sharded: whether FSDP2 may have freed its parameters, until the module is called.
        """
        own = vars(module)
        return (
            [type(module), *map(type, self._inside)] == self._kinds
            and list(map(_hooks, self._inside)) == self._hooks
            and all(held == parts for held, parts in self._parts)
            and all(
                _is_there(held.get(name), one, at, wants, maybe_sharded) for held, name, one, at, wants in self._tensors
            )
            and all((own if held is None else held).get(key) is value for held, key, value in self._dicts)
            and all((own if held is None else held).get(key, self) == value for held, key, value in self._values)
            and _implementation(module) == self._implementation
        )


def _hooks(part: nn.Module) -> list[Any] | None:
    """Hooks of this package, and those that take router logits, which do what they do while it is recorded; None where
    there are others, or a forward."""
    if is_bare(part):
        return []
    hooks = [hook for held in HOOKS for hook in vars(part)[held].values()]
    return hooks if "forward" not in vars(part) and all(map(_is_ours, hooks)) else None


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "__module__", "").partition(".")[0] == __name__.partition(".")[0] or captured.is_of_router(
        hook
    )


def _is_of_ep(tensor: Tensor) -> bool:
    """Whether it is spread over the ranks of `ep`, and this rank's part stays where it is."""
    return isinstance(tensor, DTensor) and "ep" in (tensor.device_mesh.mesh_dim_names or ())


def _is_there(found: Tensor | None, one: Tensor, at: int, wants: bool, maybe_sharded: bool) -> bool:
    """Whether a tensor is the one that was, where it was, and wants a gradient if it did."""
    if maybe_sharded and isinstance(found, DTensor) and not _is_of_ep(found):
        return found.requires_grad is wants
    return found is one and _address(one) == at and one.requires_grad is wants


def _address(tensor: Tensor) -> int:
    """Where in memory it is, or this rank's part of it."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).data_ptr()


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
