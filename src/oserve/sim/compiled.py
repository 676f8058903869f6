"""One source at two speeds: kernel functions are compiled by numba where it is installed.

Kernel functions are plain Python over flat sequences of integers. Without numba they run as they
are, on lists; ``plain`` gives that slow form even where numba is there, and ``NUMBA_DISABLE_JIT=1``
gives it everywhere: short runs are over before the kernel is compiled. What is compiled is kept
on disk beside its source. numba looks only at the file of a function and not at those of what it
calls, so whatever is older than any of the sources is thrown away first.
"""

import contextlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

try:
    import numba
except ImportError:
    numba = None
else:
    if numba.config.DISABLE_JIT:
        numba = None

HAS_NUMBA: Final = numba is not None

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CLONES: dict[Any, Any] = {}


def compiled(function: _Function) -> _Function:
    """Compile a kernel function, if that is possible here; only others of its kind may call it."""
    if numba is None:
        return function
    # What Python never calls needs no wrappers, which take a third of the time to compile.
    made: _Function = numba.njit(
        cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    return made


def door(function: _Function) -> _Function:
    """Compile a function that Python calls, if that is possible here."""
    if numba is None:
        return function
    made: _Function = numba.njit(cache=True, nogil=True)(function)
    return made


def plain(function: _Function) -> _Function:
    """The same function without compilation, down to everything it calls."""
    made: _Function = _plain(function, _CLONES)
    return made


def _plain(function: Any, made: dict[Any, Any]) -> Any:
    python = getattr(function, "py_func", function)
    if python in made:
        return made[python]
    scope = dict(python.__globals__)
    clone = types.FunctionType(
        python.__code__, scope, python.__name__, python.__defaults__, python.__closure__
    )
    made[python] = clone
    for name in python.__code__.co_names:
        if hasattr(scope.get(name), "py_func"):
            scope[name] = _plain(scope[name], made)
    return clone


def _forget_stale() -> None:
    here = Path(__file__).parent
    shared = here.parent / "control" / "pick.py"
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime for path in (*here.glob("*.py"), shared))
        for folder in (here, shared.parent):
            for index in folder.glob("__pycache__/*.nbi"):
                if index.stat().st_mtime < newest:
                    index.unlink(missing_ok=True)


if HAS_NUMBA:
    _forget_stale()
