"""Layers that one module calls with the same input: the first that is called may compute for all of them.

Which layers those may be is read in the module's code, where `self.q_proj(x)`, `self.k_proj(x)` and `self.v_proj(x)`
name the same variable; no family is known by name. That they are is seen at every call: a result is handed out for
the very tensor that it was made of, unchanged since, to a layer whose parameters are those it was made with. Layers
that turn out to be called with another tensor, or not at all, compute by themselves from the next forward on: a
recompute under activation checkpointing keeps what its forward kept.
"""

import ast
import inspect
import textwrap
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn

from moe_accel.backward import in_backward
from moe_accel.swap import own_class

ATTRIBUTE = "_moe_accel_siblings"
"""Where a layer has its `Siblings`."""


class _Made(NamedTuple):
    """An output, and all that it was made of but the input."""

    output: Tensor
    key: tuple[Any, ...]
    versions: list[int]


class Siblings:
    """Layers that may be called with the same input, and what was made for those not called yet.

    A copy, or one from a file, has no layers: each of them computes by itself until `introduce`.
    """

    def __init__(self, layers: tuple[Any, ...] = ()):
        self._layers = tuple(map(ref, layers))  # no cycle that would keep a deleted model in memory
        self._apart = False  # for good, from the next forward on
        self._were_together = True  # in the last forward, and so in its recompute
        self._x: Tensor | None = None
        self._version = 0
        self._made: dict[int, _Made] = {}
        self._in_forward = False

    def __reduce__(self) -> tuple:
        return Siblings, ()

    def made(self, layer: Any, x: Tensor, key: tuple[Any, ...]) -> Tensor | None:
        """The output of `layer` for x, once, if it was made already with what is in `key`; else None."""
        if not self._is_for(x):
            self._apart = self._apart or (self._x is not None and self._in_forward)  # some did not come
            self._x, self._made = None, {}
            return None
        made = self._made.pop(id(layer), None)
        if not self._made:
            self._x = None
        if made is None or made.versions != _versions(key) or not _identical(made.key, key):
            return None
        return made.output

    def together(self, layer: Any, x: Tensor) -> list[Any]:
        """The other layers that `layer` computes for, when it is called with x and nothing was made for it."""
        if not in_backward():
            self._were_together = not self._apart
        layers = [each() for each in self._layers]
        is_one = any(each is layer for each in layers)  # a replica is not
        if not self._were_together or not is_one or self._is_for(x):
            return []
        return [each for each in layers if each is not None and each is not layer]

    def _is_for(self, x: Tensor) -> bool:
        """Whether others are still to come for what was made of this x."""
        return self._x is x and self._version == x._version

    def keep(self, x: Tensor, layers: list[Any], outputs: list[Tensor], keys: list[tuple[Any, ...]]) -> None:
        """Have these outputs of layers for x, made with what is in their keys, until the layers are called."""
        made = [_Made(output, key, _versions(key)) for output, key in zip(outputs, keys, strict=True)]
        self._made = dict(zip(map(id, layers), made, strict=True))
        self._x, self._version, self._in_forward = x, x._version, not in_backward()


def introduce(model: nn.Module, kind: type) -> None:
    """Give those children of a module that are of `kind`, and called with the same variable there, their `Siblings`."""
    for module in model.modules():
        names = [name for name, each in module.named_children() if isinstance(each, kind)]
        groups = called_alike(own_class(module), tuple(names)) if len(names) > 1 else ()
        for group in groups:
            layers = tuple(getattr(module, name) for name in group)
            siblings = Siblings(layers)
            for each in layers:
                vars(each)[ATTRIBUTE] = siblings


@cache
def called_alike(kind: type, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Which of the attributes `names` the forward of a class calls with the same variable alone, in groups of two at
    least: nothing where its code is not at hand, where one is called twice, or the variable is set between the calls.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))  # pyright: ignore
    except (OSError, TypeError, SyntaxError, AttributeError):
        return ()
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    stores: dict[str, list[int]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stores[node.id].append(node.lineno)
        if isinstance(node, ast.Call) and (name := _own(node.func)) in names:
            alone = len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name)
            calls[name].append((node.args[0].id if alone else "", node.lineno))  # pyright: ignore
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if len(calls[name]) == 1 and calls[name][0][0]:
            groups[calls[name][0][0]].append(name)
    found = []
    for variable, group in groups.items():
        lines = [calls[name][0][1] for name in group]
        is_set = any(min(lines) <= line <= max(lines) for line in stores[variable])
        if len(group) > 1 and not is_set:
            found.append(tuple(group))
    return tuple(found)


def _own(function: ast.expr) -> str:
    """The name of an attribute of `self`; else empty."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return function.attr
    return ""


def _identical(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Whether two tuples hold the same tensors, and equal values."""
    pairs = zip(found, expected, strict=True)
    return all(one is other or (not isinstance(one, Tensor) and one == other) for one, other in pairs)


def _versions(key: tuple[Any, ...]) -> list[int]:
    """How often each tensor of a key was changed in place, as far as torch knows."""
    return [each._version for each in key if isinstance(each, Tensor) and not each.is_inference()]
