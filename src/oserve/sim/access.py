"""Named access to the arrays that a replica keeps within ``mem``: step tables, sequences, stages.

Each array of a replica begins where one of its fields says (see ``layout``). These functions are
inlined by the compiler and cost nothing there. Loops take the ``column`` once and index from it,
which also keeps the uncompiled form fast.
"""

from oserve.sim.compiled import compiled
from oserve.sim.state import Flat


@compiled
def column(mem: Flat, at: int, field: int) -> int:
    """Position in ``mem`` of the first entry of the array that ``field`` names."""
    return at + mem[at + field]


@compiled
def entry(mem: Flat, at: int, field: int, index: int) -> int:
    """One entry of the array that ``field`` names."""
    return mem[at + mem[at + field] + index]


@compiled
def set_entry(mem: Flat, at: int, field: int, index: int, value: int) -> None:
    """Replace one entry."""
    mem[at + mem[at + field] + index] = value


@compiled
def add_to_entry(mem: Flat, at: int, field: int, index: int, amount: int) -> None:
    """Add to one entry; ``amount`` may be negative."""
    mem[at + mem[at + field] + index] += amount
