"""The kernel's entry points for Python, compiled or not.

numba counts the references to every array at every call, which takes longer than most kernel
functions. It does not count pointers. So compiled functions get the addresses of the arrays, and
the caller keeps the arrays alive.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from oserve.sim import kernel, routing
from oserve.sim.compiled import compiled, entry_point, plain
from oserve.sim.pointers import integers, reals
from oserve.sim.state import Flat, KernelState, Reals

StateArray = NDArray[np.int64 | np.float64]
Addresses = NDArray[np.int64]
"""Addresses of the state's arrays, in the order of its fields."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@compiled
def state_at(addresses: Addresses) -> KernelState:
    """A state made of pointers."""
    return KernelState(
        integers(addresses[0]),
        integers(addresses[1]),
        integers(addresses[2]),
        integers(addresses[3]),
        integers(addresses[4]),
        integers(addresses[5]),
        integers(addresses[6]),
        integers(addresses[7]),
        reals(addresses[8]),
        reals(addresses[9]),
        reals(addresses[10]),
        reals(addresses[11]),
        reals(addresses[12]),
        integers(addresses[13]),
        integers(addresses[14]),
        integers(addresses[15]),
        integers(addresses[16]),
        integers(addresses[17]),
        reals(addresses[18]),
        integers(addresses[19]),
        reals(addresses[20]),
        integers(addresses[21]),
        reals(addresses[22]),
    )


@entry_point
def _next_moment(addresses: Addresses) -> int:
    return kernel.next_moment(state_at(addresses))


@entry_point
def _advance(addresses: Addresses, until: int, skip: int) -> None:
    kernel.advance(state_at(addresses), until, skip)


@entry_point
def _flush(addresses: Addresses, skip: int) -> None:
    kernel.flush(state_at(addresses), skip)


@entry_point
def _observe(addresses: Addresses, now: int) -> None:
    kernel.observe(state_at(addresses), now)


@entry_point
def _remove(addresses: Addresses, index: int, again: int, now: int) -> None:
    kernel.remove(state_at(addresses), index, again, now)


@entry_point
def _hang(addresses: Addresses, index: int, now: int) -> None:
    kernel.hang(state_at(addresses), index, now)


@entry_point
def _migrate(addresses: Addresses, request: int, target: int, now: int) -> bool:
    return kernel.migrate(state_at(addresses), request, target, now)


@entry_point
def _freeness(addresses: Addresses, index: int, now: int) -> float:
    return routing.freeness(state_at(addresses), index, now)


@entry_point
def _free_at(addresses: Addresses, index: int, now: int) -> int:
    return routing.free_at(state_at(addresses), index, now)


@dataclass(frozen=True, slots=True)
class EntryPoint(Generic[_Parameters, _Result]):
    """A kernel function in both forms: compiled, for addresses, and plain, for lists."""

    compiled: Callable[Concatenate[Addresses, _Parameters], _Result]
    plain: Callable[Concatenate[KernelState, _Parameters], _Result]


NEXT_MOMENT = EntryPoint(_next_moment, kernel.next_moment)
ADVANCE = EntryPoint(_advance, kernel.advance)
FLUSH = EntryPoint(_flush, kernel.flush)
OBSERVE = EntryPoint(_observe, kernel.observe)
REMOVE = EntryPoint(_remove, kernel.remove)
HANG = EntryPoint(_hang, kernel.hang)
MIGRATE = EntryPoint(_migrate, kernel.migrate)
FREENESS = EntryPoint(_freeness, routing.freeness)
FREE_AT = EntryPoint(_free_at, routing.free_at)


class Kernel:
    """A fleet's state, and the functions that act on it.

    ``compiled`` of ``False`` keeps lists and runs plain Python.
    """

    def __init__(self, arrays: Mapping[str, StateArray], *, compiled: bool) -> None:
        self._compiled = compiled
        self._arrays: dict[str, StateArray] = {}
        self._values: dict[str, Flat | Reals] = {}
        self.change(arrays)

    def change(self, arrays: Mapping[str, StateArray]) -> None:
        """Replace some of the state's arrays, by name; they are copied."""
        for name, values in arrays.items():
            own = np.ascontiguousarray(values).copy()
            self._arrays[name] = own
            # Compiled code and Python index arrays and lists in the same way.
            self._values[name] = cast("Flat", own) if self._compiled else own.tolist()
        self.state = KernelState._make(self._values[name] for name in KernelState._fields)
        if self._compiled:
            held = [self._arrays[name].ctypes.data for name in KernelState._fields]
            self._addresses = np.array(held, dtype=np.int64)

    def run(
        self,
        entry: EntryPoint[_Parameters, _Result],
        *arguments: _Parameters.args,
        **named: _Parameters.kwargs,
    ) -> _Result:
        """Run one of the kernel's functions."""
        if self._compiled:
            return entry.compiled(self._addresses, *arguments, **named)
        return plain(entry.plain)(self.state, *arguments, **named)
