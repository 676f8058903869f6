"""Types of the kernel's arguments: flat arrays of numpy where it is compiled, lists elsewhere."""

from collections.abc import MutableSequence
from typing import NamedTuple

# Of 64-bit integers.
Flat = MutableSequence[int]
Reals = MutableSequence[float]


class KernelState(NamedTuple):
    """All that a fleet is; see ``layout``.

    ``shares`` and ``credit`` are [classes * replicas], ``costs`` [2 * replicas]: seconds per prompt
    and per output token. What follows is scratch space, an entry for each replica.
    """

    req: Flat
    mem: Flat
    ses: Flat
    glob: Flat
    where: Flat
    queue: Flat
    late: Flat
    moves: Flat
    shares: Reals
    credit: Reals
    costs: Reals
    work: Reals
    own: Reals
    inflight: Flat
    most: Flat
    fits: Flat
