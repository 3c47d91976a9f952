"""What checks annotations at each call, shapes and dtypes of tensors included.

As type checkers do, it takes an int for a float. It costs a fraction of a tiny model's training, so
each function gets no more than it needs: jaxtyping, which binds arguments and checks them twice,
only where an annotation names a shape; elsewhere beartype alone. Functions within functions are
left alone: they would be wrapped anew each time that the outer one runs.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_usual = jaxtyping.jaxtyped


def check(modules: list[str]) -> None:
    """Check all functions of these modules, which must not have been imported yet."""
    jaxtyping.jaxtyped = _wrapped  # by this name jaxtyping's hook decorates
    jaxtyping.install_import_hook(modules, f"{__name__}.checked")


def _wrapped(fn: Any = None, *, typechecker: Any) -> Any:
    """Stands for `jaxtyping.jaxtyped`."""
    if fn is None:
        return lambda fn: _wrapped(fn, typechecker=typechecker)
    if not isinstance(fn, FunctionType):
        return _usual(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return fn
    hints = {name: _hint(fn, annotation) for name, annotation in fn.__annotations__.items()}
    if any(map(_has_shape, hints.values())):
        return _usual(fn, typechecker=typechecker)
    fn.__annotations__ = hints
    return typechecker(fn)


def _hint(fn: Callable[..., Any], annotation: Any) -> Any:
    """What an annotation means; of names that only type checkers import, anything."""

    def of(value):
        pass

    of.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(of, fn.__globals__, include_extras=True)["value"]
    except NameError:
        return Any


def _has_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(_has_shape, get_args(hint)))
