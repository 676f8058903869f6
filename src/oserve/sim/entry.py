"""The kernel's doors: what Python may ask of a fleet's state, compiled or not.

numba counts references to every array at every call, which takes longer than most kernel functions
do; it does not for pointers. So compiled functions get the addresses of the arrays, which whoever
calls keeps alive.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oserve.sim import gateway, kernel
from oserve.sim.compiled import compiled, door, plain
from oserve.sim.pointers import integers, reals
from oserve.sim.state import KernelState


@compiled
def state_at(addresses: Any) -> KernelState:
    """A state of pointers."""
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
    )


@door
def _next_moment(addresses: Any) -> int:
    return kernel.next_moment(state_at(addresses))


@door
def _advance(addresses: Any, until: int, skip: int) -> None:
    kernel.advance(state_at(addresses), until, skip)


@door
def _flush(addresses: Any, skip: int) -> None:
    kernel.flush(state_at(addresses), skip)


@door
def _observe(addresses: Any, now: int) -> None:
    kernel.observe(state_at(addresses), now)


@door
def _remove(addresses: Any, index: int, again: int, now: int) -> None:
    kernel.remove(state_at(addresses), index, again, now)


@door
def _hang(addresses: Any, index: int, now: int) -> None:
    kernel.hang(state_at(addresses), index, now)


@door
def _migrate(addresses: Any, request: int, target: int, now: int) -> bool:
    return kernel.migrate(state_at(addresses), request, target, now)


@door
def _freeness(addresses: Any, index: int, now: int) -> float:
    return gateway.freeness(state_at(addresses), index, now)


@door
def _free_at(addresses: Any, index: int, now: int) -> int:
    return gateway.free_at(state_at(addresses), index, now)


# By name: for addresses, compiled, and for lists.
_DOORS: dict[str, tuple[Any, Any]] = {
    "next_moment": (_next_moment, kernel.next_moment),
    "advance": (_advance, kernel.advance),
    "flush": (_flush, kernel.flush),
    "observe": (_observe, kernel.observe),
    "remove": (_remove, kernel.remove),
    "hang": (_hang, kernel.hang),
    "migrate": (_migrate, kernel.migrate),
    "freeness": (_freeness, gateway.freeness),
    "free_at": (_free_at, gateway.free_at),
}


Array = NDArray[Any]


class Kernel:
    """A fleet's state, and what may be done with it; arguments are integers.

    ``compiled`` of ``False`` keeps lists and runs plain Python.
    """

    def __init__(self, arrays: Mapping[str, Array], *, compiled: bool) -> None:
        self._compiled = compiled
        self._values: dict[str, Any] = {}
        self.change(arrays)

    def change(self, arrays: Mapping[str, Array]) -> None:
        """Replace some of the state's arrays, by name."""
        for name, values in arrays.items():
            own = np.ascontiguousarray(values).copy()
            self._values[name] = own if self._compiled else own.tolist()
        self.state = KernelState(**self._values)
        if self._compiled:
            self._addresses = np.array(
                [self._values[name].ctypes.data for name in KernelState._fields]
            )

    def do(self, name: str, *arguments: int) -> Any:
        """Run one of the kernel's functions."""
        entry, function = _DOORS[name]
        if self._compiled:
            return entry(self._addresses, *arguments)
        return plain(function)(self.state, *arguments)
