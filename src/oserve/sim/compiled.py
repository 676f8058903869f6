"""Compiles kernel functions with numba if it is installed; otherwise they run in Python.

Kernel functions are plain Python over flat sequences of integers. Without numba they run
uncompiled, on lists. ``plain`` returns the uncompiled form even if numba is installed, and
``NUMBA_DISABLE_JIT=1`` disables compilation: a short run ends before the kernel is compiled. numba
caches compiled code next to its source. It checks only the file of a function and not those of its
callees, so this module deletes cached code that is older than any of the sources.
"""

import contextlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar, cast

from oserve.control.dispatch import pick

try:
    import numba
except ImportError:
    numba = None
else:
    if numba.config.DISABLE_JIT:
        numba = None

HAS_NUMBA: Final = numba is not None

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Function = Callable[_Parameters, _Result]
_CLONES: dict[types.FunctionType, types.FunctionType] = {}


def compiled(function: _Function[_Parameters, _Result]) -> _Function[_Parameters, _Result]:
    """Compile a kernel function, if numba is installed; only compiled functions may call it."""
    if numba is None:
        return function
    # Python never calls it, so skip the wrappers, which take a third of the compilation time.
    made = numba.njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return cast("_Function[_Parameters, _Result]", made(function))


def entry_point(function: _Function[_Parameters, _Result]) -> _Function[_Parameters, _Result]:
    """Compile a function that Python calls, if numba is installed."""
    if numba is None:
        return function
    made = numba.njit(cache=True, nogil=True)
    return cast("_Function[_Parameters, _Result]", made(function))


def plain(function: _Function[_Parameters, _Result]) -> _Function[_Parameters, _Result]:
    """The same function without compilation, and without that of any function it calls."""
    return cast("_Function[_Parameters, _Result]", _plain(function, _CLONES))


# numba's compiled functions have no static type.
def _plain(function: Any, clones: dict[types.FunctionType, types.FunctionType]) -> Any:
    python = getattr(function, "py_func", function)
    if python in clones:
        return clones[python]
    scope = dict(python.__globals__)
    clone = types.FunctionType(
        python.__code__, scope, python.__name__, python.__defaults__, python.__closure__
    )
    clones[python] = clone
    for name in python.__code__.co_names:
        if hasattr(scope.get(name), "py_func"):
            scope[name] = _plain(scope[name], clones)
    return clone


def _delete_stale() -> None:
    # Kernel functions take code and constants of these folders.
    folders = (Path(__file__).parent, Path(pick.__file__).parent)
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime for folder in folders for path in folder.glob("*.py"))
        for folder in folders:
            for index in folder.glob("__pycache__/*.nbi"):
                if index.stat().st_mtime < newest:
                    index.unlink(missing_ok=True)


if HAS_NUMBA:
    _delete_stale()
