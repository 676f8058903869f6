"""A routing table on its way to gateway processes: each node's hatch once, not per replica.

Certificate and token of a hatch are 0.7 KB, which a node of eight replicas would repeat eight
times, for each process and each change of the table.
"""

from dataclasses import replace

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.core import HatchAddress


class PackedTable(msgspec.Struct, frozen=True, kw_only=True):
    """``table``: its endpoints lack their hatches. ``at``: for each replica the number of its hatch
    among ``hatches``, or -1 for none."""

    table: RoutingTable
    hatches: tuple[HatchAddress, ...] = ()
    at: tuple[int, ...] = ()

    def unpacked(self) -> RoutingTable:
        """The table; replicas of one node share the hatch. Raises ``ValueError``, ``IndexError``
        for numbers that do not fit."""
        if not self.hatches:
            return self.table
        replicas = tuple(
            one
            if number < 0
            else replace(one, endpoint=replace(one.endpoint, hatch=self.hatches[number]))
            for one, number in zip(self.table.replicas, self.at, strict=True)
        )
        return replace(self.table, replicas=replicas)


def packed(table: RoutingTable) -> PackedTable:
    """A table to be sent."""
    numbers: dict[HatchAddress, int] = {}
    at = tuple(
        -1 if (hatch := one.endpoint.hatch) is None else numbers.setdefault(hatch, len(numbers))
        for one in table.replicas
    )
    if not numbers:
        return PackedTable(table=table)
    replicas = tuple(
        replace(one, endpoint=replace(one.endpoint, hatch=None)) for one in table.replicas
    )
    return PackedTable(table=replace(table, replicas=replicas), hatches=tuple(numbers), at=at)
