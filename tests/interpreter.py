"""Triton's interpreter, where it needs help."""

from triton.runtime import interpreter


def read_bounds_of_loops() -> None:
    """It reads a loop's bounds from arrays of one value as `int(array)`, which numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
