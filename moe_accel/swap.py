"""A module that is to compute another way gets a class of its own: a subclass of the one it had, by the same name.

A function bound to the instance would compute as well, but it refers back to its module, so that a deleted model stays
in memory until the garbage collector comes. The subclass is made once for each pair of classes, and copied or pickled
as that pair, since nobody can import it.
"""

from functools import cache
from typing import Any

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_bare(part: Any) -> bool:
    """Whether calling a module calls nothing but its class's forward: no hooks, and no forward set on it alone.

    Any other function is bare.
    """
    own = getattr(part, "__dict__", ())
    return "forward" not in own and not any(own.get(hooks) for hooks in HOOKS) if own else True


def become(module: Any, kind: type) -> None:
    """Put the methods of `kind` before those of the module's class; a second call changes nothing."""
    if not isinstance(module, kind):
        module.__class__ = _subclass(kind, type(module))


def own_class(module: Any) -> type:
    """The class that a module had before it was first given to `become`."""
    kind = type(module)
    while hasattr(kind, "_moe_accel_own_class"):
        kind = kind._moe_accel_own_class
    return kind


@cache
def _subclass(kind: type, own: Any) -> Any:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        made, (_, *arguments), *rest = own.__reduce_ex__(self, max(2, protocol))
        return _new, (made, kind, own, *arguments), *rest

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (kind, own), {**names, "_moe_accel_own_class": own, "__reduce_ex__": reduce_ex})


def _new(made: Any, kind: type, own: type, *arguments: Any) -> Any:
    return made(_subclass(kind, own), *arguments)
