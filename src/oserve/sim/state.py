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
    ``fits`` are scratch space [replicas]. ``lasts``, [3 * tiers]: by
    tier, the flow that waited last; then the rounds in which a tenant left a slot free, for
    requests that are not late and that are.
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
    flows: Flat
    levels: Reals
    holders: Flat
    weights: Reals
    lasts: Flat
    paid: Reals
