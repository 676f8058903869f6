"""Pointers to arrays, which compiled functions index like arrays."""

from typing import Any, cast

from oserve.sim.compiled import HAS_NUMBA
from oserve.sim.state import Flat, Reals

if HAS_NUMBA:
    from numba import types
    from numba.extending import intrinsic

    def _pointer_to(kind: Any) -> Any:
        pointer = types.CPointer(kind)

        def typed(_typing: Any, address: Any) -> Any:
            def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(pointer))

            return pointer(address), build

        return intrinsic(typed)

    integers = _pointer_to(types.int64)
    reals = _pointer_to(types.float64)
else:

    def integers(address: int) -> Flat:
        """A pointer to 64-bit integers."""
        return cast("Flat", address)

    def reals(address: int) -> Reals:
        """A pointer to 64-bit floats."""
        return cast("Reals", address)
