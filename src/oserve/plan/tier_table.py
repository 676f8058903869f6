"""Capacities where tiers share replicas: a replica keeps the tightest limit of those it serves.

A table by type assumes that a replica serves one type. The time per token of a request depends on
everything in its batch, so beside requests without limits it would be as slow as theirs. Hence each
shape has a level: the tightest limit of TPOT that its full batch of decoding sequences still meets.
Tiers with tighter limits have no capacity there, and all others count within that limit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from oserve.core.tier import least
from oserve.perf import ShapePerformance
from oserve.perf.capacity import LatencyLimits

Table = tuple[ShapePerformance, ...]

TIER_SEQS = (16, 32, 64, 128, 256)
"""Sequence limits to plan with where limits of TPOT differ: small batches keep tight ones."""


def tier_table(
    names: Sequence[str],
    limits: Mapping[str, LatencyLimits],
    make: Callable[[Mapping[str, LatencyLimits]], Table],
) -> Table:
    """The table for types with these limits; ``make`` gives that of any limits.

    A type that no shape of its level serves keeps its own capacities: then only a plan in which it
    is alone on its replicas can serve it.
    """
    own = make(limits)
    levels = sorted({item.tpot_s for item in limits.values() if item.tpot_s is not None})
    if len({item.tpot_s for item in limits.values()}) < 2:
        return own
    free = make({name: LatencyLimits(precisions=limits[name].precisions) for name in names})
    at = {level: make(_at_most(limits, level)) for level in levels}
    found = []
    for index, (row, alone) in enumerate(zip(own, free, strict=True)):
        batch_s = min((tpot_s for tpot_s in alone.tpot_s if tpot_s > 0), default=0.0)
        level = next((value for value in levels if batch_s <= value), None)
        if level is None:
            found.append(_without(row, names, limits, None))
        else:
            found.append(_without(at[level][index], names, limits, level))
    lost = [
        column
        for column in range(len(names))
        if not any(row.capacity_rps[column] > 0 for row in found)
    ]
    return tuple(
        replace(
            row,
            capacity_rps=tuple(
                mine.capacity_rps[column] if column in lost else capacity
                for column, capacity in enumerate(row.capacity_rps)
            ),
        )
        for row, mine in zip(found, own, strict=True)
    )


def _at_most(limits: Mapping[str, LatencyLimits], tpot_s: float) -> dict[str, LatencyLimits]:
    return {
        name: replace(item, tpot_s=least((item.tpot_s, tpot_s))) for name, item in limits.items()
    }


def _without(
    row: ShapePerformance,
    names: Sequence[str],
    limits: Mapping[str, LatencyLimits],
    level: float | None,
) -> ShapePerformance:
    """The row without types whose limit is tighter than the level; ``None``: than any."""

    def fits(name: str) -> bool:
        tpot_s = limits[name].tpot_s
        return tpot_s is None or (level is not None and tpot_s >= level)

    return replace(
        row,
        capacity_rps=tuple(
            capacity if fits(name) else 0.0
            for name, capacity in zip(names, row.capacity_rps, strict=True)
        ),
    )
