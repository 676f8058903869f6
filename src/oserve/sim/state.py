"""Types of the kernel's arguments: numpy arrays where it is compiled, lists elsewhere."""

from collections.abc import MutableSequence
from typing import NamedTuple

# Flat sequences of 64-bit integers and floats.
Flat = MutableSequence[int]
Reals = MutableSequence[float]


class KernelState(NamedTuple):
    """The whole state of a fleet; see ``layout``.

    ``shares`` and ``credit`` are [classes * replicas], ``costs`` [2 * replicas]: seconds per prompt
    and per output token; a share below 0 bars the replica from the class. ``groups`` is
    [2 * classes]: the first class that may use the same replicas, and scratch space. ``work`` to
    ``fits`` are scratch space [replicas].
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
    groups: Flat
