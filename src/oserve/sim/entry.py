"""The kernel's doors: what Python may ask of a fleet's state, compiled or not.

numba counts references to every array at every call, which takes longer than most kernel functions
do; it does not for pointers. So compiled functions get the addresses of the arrays, which whoever
calls keeps alive.
"""

from typing import Any

import numpy as np

from oserve.sim import gate, kernel
from oserve.sim.compiled import compiled, plain
from oserve.sim.pointers import integers, reals
from oserve.sim.state import State


@compiled
def state_at(addresses: Any) -> State:
    """A state of pointers."""
    return State(
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


@compiled
def _next_moment(addresses: Any) -> int:
    return kernel.next_moment(state_at(addresses))


@compiled
def _advance(addresses: Any, until: int, skip: int) -> None:
    kernel.advance(state_at(addresses), until, skip)


@compiled
def _flush(addresses: Any, skip: int) -> None:
    kernel.flush(state_at(addresses), skip)


@compiled
def _observe(addresses: Any, now: int) -> None:
    kernel.observe(state_at(addresses), now)


@compiled
def _remove(addresses: Any, index: int, again: int, now: int) -> None:
    kernel.remove(state_at(addresses), index, again, now)


@compiled
def _migrate(addresses: Any, request: int, target: int, now: int) -> bool:
    return kernel.migrate(state_at(addresses), request, target, now)


@compiled
def _freeness(addresses: Any, index: int, now: int) -> float:
    return gate.freeness(state_at(addresses), index, now)


@compiled
def _free_at(addresses: Any, index: int, now: int) -> int:
    return gate.free_at(state_at(addresses), index, now)


# By name: for addresses, compiled, and for lists.
_DOORS: dict[str, tuple[Any, Any]] = {
    "next_moment": (_next_moment, kernel.next_moment),
    "advance": (_advance, kernel.advance),
    "flush": (_flush, kernel.flush),
    "observe": (_observe, kernel.observe),
    "remove": (_remove, kernel.remove),
    "migrate": (_migrate, kernel.migrate),
    "freeness": (_freeness, gate.freeness),
    "free_at": (_free_at, gate.free_at),
}


class Kernel:
    """A fleet's state, and what may be done with it; arguments are integers.

    ``compiled`` of ``False`` keeps lists and runs plain Python.
    """

    def __init__(self, state: State, *, compiled: bool) -> None:
        self._compiled = compiled
        self.change(**state._asdict())

    def change(self, **arrays: Any) -> None:
        """Replace some of the arrays."""
        made = {name: self._flat(values) for name, values in arrays.items()}
        self.state = self.state._replace(**made) if hasattr(self, "state") else State(**made)
        if self._compiled:
            self._addresses = np.array([values.ctypes.data for values in self.state])

    def do(self, name: str, *arguments: int) -> Any:
        """Run one of the kernel's functions."""
        door, function = _DOORS[name]
        if self._compiled:
            return door(self._addresses, *arguments)
        return plain(function)(self.state, *arguments)

    def _flat(self, values: Any) -> Any:
        return (
            np.ascontiguousarray(values).copy() if self._compiled else np.asarray(values).tolist()
        )
