"""A ladder for fewer devices than it was built for, after a part of the cluster was lost. Pure."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from oserve.control.ladder import Ladder, LadderDeployment, Shapes, counted, part_of
from oserve.core import ReplicaShape

Fits = Callable[[Shapes], bool]

# The steps in which a deployment is cut.
_PARTS = 1024


def cut_ladder(ladder: Ladder, fits: Fits, *, kept: Shapes) -> Ladder:
    """The deployments that fit, and of each other one the part that fits.

    A part is taken to carry its part of the load. ``kept`` stays as it is.
    """
    found: dict[Shapes, LadderDeployment] = {}
    wider = []
    for item in ladder.deployments:
        if item.shapes == kept or fits(item.shapes):
            found[item.shapes] = item
        else:
            wider.append(item)
    for item in wider:
        shapes = largest_part(item.shapes, fits)
        if shapes and shapes not in found:
            found[shapes] = part_of(item, shapes)
    return replace(ladder, deployments=tuple(found.values()))


def largest_part(shapes: Shapes, fits: Fits) -> Shapes:
    """As many replicas of a deployment as fit, in about its proportions."""

    def cut(parts: int) -> Shapes:
        # Rounded to the nearest, so that a single wide replica is not the first to go.
        rounded = [(shape, (2 * count * parts + _PARTS) // (2 * _PARTS)) for shape, count in shapes]
        return tuple((shape, count) for shape, count in rounded if count)

    counts = Counter(dict(cut(_most(_PARTS, lambda parts: fits(cut(parts))))))
    for shape, count in sorted(shapes, key=lambda item: -item[0].device_count):
        able = partial(_fits_with, fits, counts, shape)
        counts[shape] += _most(count - counts[shape], able)
    return counted(counts)


def _fits_with(fits: Fits, counts: Counter[ReplicaShape], shape: ReplicaShape, more: int) -> bool:
    return fits(counted(counts + Counter({shape: more})))


def _most(limit: int, able: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that is able, if each smaller one is."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if able(middle) else (low, middle)
    return low
