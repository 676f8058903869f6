"""Deployments that are simulated for the ladder: of one shape, of two, and with fewer replicas.

The linear model ranks nothing here. It only leaves out shapes that it gives no capacity for some
type.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from oserve.core import Device, ReplicaShape
from oserve.plan.packing import ANY_KIND, Packing

Counts = Counter[ReplicaShape]

# Shares of the devices that the first of two shapes gets.
_SPLITS = (0.25, 0.5, 0.75)


def homogeneous(devices: Sequence[Device], shapes: Sequence[ReplicaShape]) -> list[Counts]:
    """As many replicas as fit of each shape.

    On several kinds of devices a deployment has the same shape on all kinds that have it.
    """
    found: dict[ReplicaShape, Counts] = {}
    for shape in shapes:
        most = Packing(devices, [shape]).largest(0)
        if most:
            found.setdefault(replace(shape, device_kind=ANY_KIND), Counter())[shape] = most
    return list(found.values())


def mixtures(
    devices: Sequence[Device], deployments: Sequence[Counts], *, most: int
) -> Iterator[Counts]:
    """Pairs of homogeneous deployments that share the devices, at most ``most``."""
    left = most
    for one, other in combinations(deployments, 2):
        for counts in _splits(devices, one, other):
            if left <= 0:
                return
            left -= 1
            yield counts


def smaller(counts: Counts) -> Iterator[Counts]:
    """The deployment with ever fewer replicas; for a single shape only."""
    if len(counts) != 1:
        return
    shape, most = next(iter(counts.items()))
    for count in range(most - 1, 0, -1):
        yield Counter({shape: count})


def _splits(devices: Sequence[Device], one: Counts, other: Counts) -> Iterator[Counts]:
    """Each kind of shape of the first gets a share of its replicas, the second the rest."""
    if len(one) != 1 or len(other) != 1:
        return
    first, many = next(iter(one.items()))
    second, _ = next(iter(other.items()))
    packing = Packing(devices, [first, second])
    seen = set()
    for share in _SPLITS:
        count = max(1, min(many - 1, round(share * many)))
        rest = 0
        while packing.fits((count, rest + 1)):
            rest += 1
        if rest and packing.fits((count, rest)) and (count, rest) not in seen:
            seen.add((count, rest))
            yield Counter({first: count, second: rest})
