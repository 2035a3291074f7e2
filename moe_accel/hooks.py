"""Reaching a class of another package the moment it exists, without importing that package.

Autoload runs inside `import torch`, and often a package is half imported then: `accelerate.accelerator` is already in
`sys.modules`, but its class `Accelerator` is not yet defined. Hence two ways to be told, both exact:

- module not yet imported: a finder on `sys.meta_path` acts right after the module's code has run. The finder finds
  nothing itself, and leaves `sys.meta_path` with the last module it waits for.
- module half imported: its `__class__` (which Python lets one assign, "customizing module attribute access") acts when
  the class is first asked for from outside, as in `from accelerate.accelerator import Accelerator`.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from moe_accel.errors import DependencyError

_MARK = "__moe_accel__"


def when_defined(module: str, name: str, action: Callable[[Any], None]) -> None:
    """Call `action(module.name)` once: now, or as soon as `module` has defined `name`."""
    present = sys.modules.get(module)
    if present is None:
        _finder.waiting.setdefault(module, []).append((name, action))
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    elif name in vars(present):
        action(vars(present)[name])
    else:
        _act_on_first_access(present, name, action)


def wrap(owner: type | ModuleType, name: str, around: Callable[[Callable], Callable]) -> None:
    """Replace the method (or module's function) `owner.name` by `around(method)`; a second call changes nothing.

    Raises:
        DependencyError: `owner` has no such method, because another version of its package moved it.
    """
    found = inspect.getattr_static(owner, name, None)
    if found is None:
        place = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        raise _moved(f"{place}.{name}")
    method = found.__func__ if isinstance(found, staticmethod) else found
    if hasattr(method, _MARK):
        return
    wrapper = functools.wraps(method)(around(method))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, staticmethod(wrapper) if isinstance(found, staticmethod) else wrapper)


def lazily(module: str, table: str, key: str) -> Callable[[Callable], Callable]:
    """A wrapper for `wrap` that calls `table[key](original, ...)` of a module imported at the first call."""

    def around(original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(module), table)[key](original, *args, **kwargs)

        return call

    return around


def _moved(what: str) -> DependencyError:
    return DependencyError(
        f"moe-accel extends {what}, which the installed version does not have",
        "install the versions that moe-accel supports: pip install -U moe-accel 'accelerate>=1.15,<2'",
    )


def _act_on_first_access(module: ModuleType, name: str, action: Callable[[Any], None]) -> None:
    plain = type(module)

    class HalfImported(plain):
        def __getattribute__(self, asked: str) -> Any:
            if asked == name and name in vars(self) and type(self) is HalfImported:
                self.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]
                action(vars(self)[name])
            return plain.__getattribute__(self, asked)

    module.__class__ = HalfImported


class _Finder:
    """Meta-path finder that only notices which of the modules waited for have been executed."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[tuple[str, Callable[[Any], None]]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The other finders' spec of a module waited for, with the actions behind its execution; else None."""
        actions = self.waiting.get(fullname)
        if actions is None:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.waiting.pop(fullname, None)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)
            for name, action in actions:
                if name not in vars(module):
                    raise _moved(f"{fullname}.{name}")
                action(vars(module)[name])

        spec.loader.exec_module = exec_module
        return spec


_finder = _Finder()
