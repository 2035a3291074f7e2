"""Which module of a block is a shared expert whose call may be moved beside dispatch: proven, never looked up by name.

Each kind of block runs on the meta device, where nothing is computed, in training and in evaluation: once to see which
modules it calls, when, and with what; then with the call of a candidate moved. That must have been taken up, the output
of the moved call must not be used, nor its input be changed, before the experts, and the same parameters must get a
gradient. A candidate has matrices, takes one tensor and gives one of that shape; the largest is tried first.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.experts.beside import Awaited, Beside, BlockBeside, SharedBeside, Slot, see
from moe_accel.experts.function import settings_of
from moe_accel.swap import become

NOT_PROVEN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a block may raise that does not run on one tensor of the meta device."""

EXPERTS = ""
"""Name of the experts among a block's calls."""


@dataclass(frozen=True)
class Found:
    """Names of modules of a block.

    Attributes:
        shared: the shared expert.
        sees: what is called before the experts with its later input; None where the shared expert itself is.
    """

    shared: str
    sees: str | None


@dataclass
class _Seen:
    """One run of a block.

    Attributes:
        calls: of the block's modules in order: name, arguments, keywords, output.
        work: whether the experts found something to compute beside.
        trained: names of the parameters that got a gradient.
    """

    calls: list[tuple[str, tuple, dict, Any]] = field(default_factory=list)
    work: bool = False
    trained: set[str] = field(default_factory=set)


def compute_beside(experts: list[tuple[str, Any]], model: nn.Module) -> list[str]:
    """Let the shared experts of a model's blocks be computed while tokens travel; returns lines for the report.

    Args:
        experts: those of `find_experts`, with settings.
        model: that they are in, not yet sharded.
    """
    blocks: dict[nn.Module, list[tuple[str, Any]]] = {}
    for name, module in experts:
        block, child = block_of(model, name)
        blocks.setdefault(block, []).append((child, module))
    proven: dict[Any, Found | str | None] = {}
    said: Counter[Found | str | None] = Counter()
    for block, inside in blocks.items():
        kind = type(block), inside[0][0], *((name, type(each)) for name, each in block.named_modules())
        if kind not in proven:
            proven[kind] = find(block, *inside[0])
        found = proven[kind] if len({child for child, _ in inside}) == 1 else None
        if isinstance(found, Found):
            beside = attach(block, found)
            for _, module in inside:
                settings_of(module).beside = beside
        said[found] += 1
    moved = sum(count for found, count in said.items() if isinstance(found, Found))
    lines = [f"shared experts of {moved} of {len(blocks)} layers computed while tokens travel"] if moved else []
    reasons = ((why, count) for why, count in said.items() if isinstance(why, str))
    return lines + [
        f"shared experts of {count} layers computed while no tokens travel: {why}" for why, count in reasons
    ]


def find(block: Any, child: str, experts: Any) -> Found | str | None:
    """The shared expert of a block; why its call can't be moved, or None where it has none.

    Args:
        block: with `child`, a module of it, in which the experts are.
        child: name of that module.
        experts: the experts module.
    """
    hidden = getattr(experts.config, "hidden_size", None)
    if "forward" in vars(block) or not isinstance(hidden, int):
        return None
    with _modes_kept(block):
        found = [_find_in_mode(block.train(training), child, hidden) for training in (True, False)]
    return found[0] if found[0] == found[1] else "training and evaluation differ"


def _find_in_mode(block: Any, child: str, hidden: int) -> Found | str | None:
    try:
        plain = _run(block, child, hidden)
    except NOT_PROVEN:
        return None  # nothing is known about it, and it is as it was
    why = None
    for found in _candidates(block, plain):
        try:
            with _attached(block, found) as beside:
                moved = _run(block, child, hidden, beside)
            used = any(isinstance(each, Awaited) for _, args, *_ in moved.calls for each in args)
            if moved.work and not used and moved.trained == plain.trained:
                return found
            why = "its output is used before the experts" if found.sees is None else "it is called with another tensor"
        except NOT_PROVEN as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return why


def _candidates(block: Any, plain: _Seen) -> list[Found]:
    names = [name for name, *_ in plain.calls]
    if names.count(EXPERTS) != 1:
        return []
    at = names.index(EXPERTS)
    found = []
    for number, (name, args, kwargs, output) in enumerate(plain.calls):
        if names.count(name) != 1 or number == at or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            continue
        matrices = sum(each.numel() for each in block.get_submodule(name).parameters() if each.ndim > 1)
        if not matrices or not isinstance(output, Tensor) or output.shape != args[0].shape:
            continue
        if number < at:
            found.append((matrices, Found(name, None)))
            continue
        before = plain.calls[:at]
        sees = next((other for other, given, *_ in before if given and given[0] is args[0]), None)
        if sees is not None:
            found.append((matrices, Found(name, sees)))
    return [each for _, each in sorted(found, key=lambda pair: -pair[0])]


def attach(block: Any, found: Found) -> Beside:
    """Let a block and its shared expert be what `beside.py` needs; returns what their experts are to compute beside."""
    shared = block.get_submodule(found.shared)
    slot = Slot(found.shared, found.sees is not None)
    for module, kind in ((block, BlockBeside), (shared, SharedBeside)):
        module._moe_accel_slot = slot
        become(module, kind)
    if found.sees is not None:
        router = block.get_submodule(found.sees)
        router._moe_accel_slot = slot
        router.register_forward_pre_hook(see)
    return Beside(slot, shared)


@contextmanager
def _attached(block: Any, found: Found) -> Iterator[Beside]:
    """`attach`, for a while."""
    modules = [block, *(block.get_submodule(name) for name in (found.shared, found.sees) if name is not None)]
    before = [(module, module.__class__, module._forward_pre_hooks.copy()) for module in modules]
    try:
        yield attach(block, found)
    finally:
        for module, own, hooks in before:
            module.__class__, module._forward_pre_hooks = own, hooks
            vars(module).pop("_moe_accel_slot", None)


# ---- running a block without computing anything


def _run(block: Any, child: str, hidden: int, beside: Beside | None = None) -> _Seen:
    """What a block does with two tokens of `hidden` values; its experts give back what they get."""
    seen = _Seen()

    def experts(*args: Any, **kwargs: Any) -> Tensor:
        work = None if beside is None else beside.work()
        if work is not None:
            awaited = getattr(work, "__self__", None)
            early = isinstance(awaited, Awaited) and awaited.is_computed
            work()
            seen.work = not early
        seen.calls.append((EXPERTS, args, kwargs, None))
        return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)).clone()

    tensors = {name: _meta(each) for name, each in _tensors(block)}
    dtype = next((each.dtype for each in tensors.values() if each.is_floating_point()), torch.float32)
    x = torch.empty(1, 2, hidden, dtype=dtype, device="meta", requires_grad=True).clone()
    module = block.get_submodule(child)
    own = vars(module).get("forward")
    module.forward = experts
    hooks = []
    try:
        for name, part in block.named_children():
            if name != child:
                hooks.append(part.register_forward_hook(_noting(name, seen), with_kwargs=True))
        output = torch.func.functional_call(block, tensors, (x,))
        if beside is not None and beside.slot.late:
            seen.work = seen.work and beside.slot.taken
    finally:
        for hook in hooks:
            hook.remove()
        del module.forward
        if own is not None:
            module.forward = own
    first = output[0] if isinstance(output, tuple) else output
    first.sum().backward()
    seen.trained = {name for name, each in tensors.items() if each.grad is not None}
    return seen


def _noting(name: str, seen: _Seen) -> Any:
    def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        seen.calls.append((name, args, kwargs, output))

    return note


def _tensors(block: Any) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)


def _meta(tensor: Tensor) -> Tensor:
    """One of its shape and dtype, and nothing read of it: weights may still be in their files."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return made.requires_grad_(isinstance(tensor, nn.Parameter) and made.is_floating_point())


@contextmanager
def _modes_kept(block: Any) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, that it was in."""
    before = [(module, module.training) for module in block.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def block_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The block that an experts module is in, PEFT's wrappers left out, and the name of the experts there."""
    child = name
    while True:
        parent, _, last = child.rpartition(".")
        block = model.get_submodule(parent)
        if not (type(block).__module__.startswith("peft.") or isinstance(block, nn.ModuleDict)):
            return block, last
        child = parent
