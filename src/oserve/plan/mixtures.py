"""Deployments that are simulated for the ladder: of one shape, of two, and with fewer replicas.

The linear model ranks nothing here. It only leaves out shapes that it gives no capacity for some
type.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice

from oserve.core import Device, ReplicaShape
from oserve.plan.packing import ANY_KIND, Packing

Counts = Counter[ReplicaShape]

# Shares of the devices that the first of two shapes gets. Where it gets all that it can use, the
# second gets the devices that it leaves free, which may be of another kind.
_SPLITS = (0.25, 0.5, 0.75, 1.0)


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
    pairs = combinations(deployments, 2)
    yield from islice((c for one, other in pairs for c in _splits(devices, one, other)), most)


def smaller(counts: Counts) -> Iterator[Counts]:
    """The deployment with ever fewer replicas, down to one.

    With several shapes one after the other goes, in cyclic orders.
    """
    shapes, seen = list(counts), set()
    for first in range(len(shapes)):
        left = Counter(counts)
        for shape in (*shapes[first:], *shapes[:first]):
            while left[shape] and left.total() > 1:
                left[shape] -= 1
                found = +left
                key = frozenset(found.items())
                if key not in seen:
                    seen.add(key)
                    yield found


def _splits(devices: Sequence[Device], one: Counts, other: Counts) -> Iterator[Counts]:
    """Some replicas of the first, and as many of the second as fit beside them."""
    shapes = list(dict.fromkeys([*one, *other]))
    packing, seen = Packing(devices, shapes), set()
    for part in _parts(one):
        counts = [part[shape] for shape in shapes]
        for place in range(len(one), len(shapes)):
            counts[place] = _most(packing, counts, place)
        if any(counts[len(one) :]) and tuple(counts) not in seen:
            seen.add(tuple(counts))
            yield +Counter(dict(zip(shapes, counts, strict=True)))


def _most(packing: Packing, counts: Sequence[int], place: int) -> int:
    """As many replicas of one shape as fit beside the others."""
    tried = list(counts)
    while packing.fits(tried):
        tried[place] += 1
    return max(0, tried[place] - 1)


def _parts(counts: Counts) -> Iterator[Counts]:
    """A share of each shape; with several kinds of devices also the replicas of a single kind."""
    for share in _SPLITS:
        yield Counter({shape: max(1, round(share * many)) for shape, many in counts.items()})
    if len(counts) > 1:
        for shape, many in counts.items():
            yield Counter({shape: many})
