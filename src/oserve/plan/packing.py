"""Packing: which counts of replicas fit on the nodes.

A replica is ``pipeline_parallel_size`` stages. A stage is a group of ``tensor_parallel_size``
devices of one kind within a node (if groups may span nodes, all devices of a kind count as one
node). Stages of a replica may lie on different nodes, so the items to pack are groups.

Where the group sizes of a kind form a divisibility chain (1, 2, 4, 8), counts fit if and only if
for every size t

    sum over groups of size >= t of their devices  <=  sum over nodes of floor(size / t) * t.

Necessary: groups of size >= t are multiples of t, and a node holds at most floor(size / t) * t
devices in multiples of t. Sufficient: place groups in descending order. Before a group of size t,
all placed groups are multiples of t, so the number of free slots of size t is
sum floor(size / t) - placed / t, at least 1 by the condition, whichever nodes hold the earlier
groups. Other sizes (3 beside 2) need one integer variable per node and size.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from oserve.core import Device, ReplicaShape

ANY_KIND = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRow:
    """A linear condition: ``sum(counts) + sum(groups) <= upper`` (both with coefficients).

    ``counts`` maps an option to its coefficient, ``groups`` an index of an extra integer variable,
    each the number of groups of one size on one node.
    """

    counts: Mapping[int, float]
    groups: Mapping[int, float]
    upper: float


class Packing:
    """The nodes of a cluster as bins for replicas of the given shapes."""

    def __init__(
        self,
        devices: Sequence[Device],
        shapes: Sequence[ReplicaShape],
        *,
        tensor_parallel_across_nodes: bool = False,
    ) -> None:
        kinds = sorted({device.kind for device in devices})
        self._shapes = tuple(shapes)
        self._across = tensor_parallel_across_nodes
        self._nodes = {kind: _nodes(devices, kind, self._across) for kind in kinds}
        self.kinds = tuple(
            kinds[0] if shape.device_kind == ANY_KIND and len(kinds) == 1 else shape.device_kind
            for shape in shapes
        )
        self._chained = {kind: is_chain(self._sizes(kind)) for kind in kinds}
        self.rows, self.extra_columns = self._conditions()
        chain_rows = [row for row in self.rows if not row.groups]
        self._matrix = np.zeros((len(chain_rows), len(shapes)))
        for index, row in enumerate(chain_rows):
            for option, coefficient in row.counts.items():
                self._matrix[index, option] = coefficient
        self._limits = np.array([row.upper for row in chain_rows])
        self._unchained = [kind for kind in kinds if not self._chained[kind]]
        self._largest = [self._largest_count(index) for index in range(len(shapes))]
        self._most = np.array(self._largest)

    def largest(self, option: int) -> int:
        """The most replicas of this option alone that fit; 0 if none does."""
        return self._largest[option]

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether these counts, one per shape, fit together."""
        amounts = np.asarray(counts)
        if (amounts > self._most).any() or (self._matrix @ amounts > self._limits).any():
            return False
        return all(
            node_groups(self.groups(counts, kind), self._nodes[kind]) is not None
            for kind in self._unchained
        )

    def groups(self, counts: Sequence[int], kind: str) -> Counter[int]:
        """The number of tensor-parallel groups of each size that these counts take of a kind."""
        groups: Counter[int] = Counter()
        for shape, of_kind, count in zip(self._shapes, self.kinds, counts, strict=True):
            if of_kind == kind and count:
                groups[shape.tensor_parallel_size] += shape.pipeline_parallel_size * count
        return groups

    def describe(self) -> str:
        """The cluster in words, such as "4 x 8 h100"."""
        parts: list[str] = []
        for kind, nodes in self._nodes.items():
            sizes = Counter(nodes.values())
            parts.extend(f"{number} x {size} {kind}" for size, number in sorted(sizes.items()))
        return ", ".join(parts)

    def all_counts(self) -> Iterator[tuple[int, ...]]:
        """Every vector of counts that fits, the empty one included."""
        counts = [0] * len(self._shapes)

        def extend(option: int) -> Iterator[tuple[int, ...]]:
            if option == len(counts):
                yield tuple(counts)
                return
            # Packing is monotone: counts that do not fit never fit with more replicas.
            while counts[option] <= self._largest[option] and self.fits(counts):
                yield from extend(option + 1)
                counts[option] += 1
            counts[option] = 0

        return extend(0)

    def _sizes(self, kind: str) -> list[int]:
        return sorted(
            {
                shape.tensor_parallel_size
                for shape, of_kind in zip(self._shapes, self.kinds, strict=True)
                if of_kind == kind
            }
        )

    def _largest_count(self, option: int) -> int:
        shape = self._shapes[option]
        nodes = self._nodes.get(self.kinds[option], {})
        width = shape.tensor_parallel_size
        return sum(size // width for size in nodes.values()) // shape.pipeline_parallel_size

    def _conditions(self) -> tuple[tuple[PackingRow, ...], tuple[int, ...]]:
        """The rows, and the upper bound of each extra integer variable."""
        rows: list[PackingRow] = []
        extra: list[int] = []
        for kind, nodes in self._nodes.items():
            sizes = self._sizes(kind)
            if self._chained[kind]:
                rows.extend(self._chain_row(kind, size) for size in sizes)
                continue
            slots = {}
            for node, room in nodes.items():
                for size in sizes:
                    slots[node, size] = len(extra)
                    extra.append(room // size)
            for node, room in nodes.items():
                used = {slots[node, size]: float(size) for size in sizes}
                rows.append(PackingRow(counts={}, groups=used, upper=room))
            for size in sizes:
                wanted = {
                    option: float(shape.pipeline_parallel_size)
                    for option, shape in self._of_kind(kind)
                    if shape.tensor_parallel_size == size
                }
                given = {slots[node, size]: -1.0 for node in nodes}
                rows.append(PackingRow(counts=wanted, groups=given, upper=0))
        return tuple(rows), tuple(extra)

    def _chain_row(self, kind: str, size: int) -> PackingRow:
        taken = {
            option: float(shape.device_count)
            for option, shape in self._of_kind(kind)
            if shape.tensor_parallel_size >= size
        }
        room = sum(node // size * size for node in self._nodes[kind].values())
        return PackingRow(counts=taken, groups={}, upper=room)

    def _of_kind(self, kind: str) -> Iterator[tuple[int, ReplicaShape]]:
        for option, shape in enumerate(self._shapes):
            if self.kinds[option] == kind:
                yield option, shape


def node_groups(
    groups: Mapping[int, int], nodes: Mapping[str, int]
) -> dict[str, Counter[int]] | None:
    """Place groups (number by size) on nodes (free devices by name); None if they do not fit.

    First-fit descending decides most cases. If it fails on sizes that form no chain, a search over
    the fillings of each node decides.
    """
    wanted = {size: number for size, number in groups.items() if number}
    free = dict(nodes)
    placed: dict[str, Counter[int]] = {node: Counter() for node in nodes}
    short = False
    for size in sorted(wanted, reverse=True):
        left = wanted[size]
        for node, room in free.items():
            number = min(left, room // size)
            if number:
                placed[node][size] += number
                free[node] = room - number * size
                left -= number
        short = short or left > 0
    if not short:
        return placed
    if is_chain(sorted(wanted)) or sum(s * n for s, n in wanted.items()) > sum(nodes.values()):
        return None
    return _searched_groups(wanted, nodes)


def _searched_groups(
    wanted: Mapping[int, int], nodes: Mapping[str, int]
) -> dict[str, Counter[int]] | None:
    """Search node by node, the largest first, over maximal fillings, with memoised dead ends."""
    sizes = sorted(wanted, reverse=True)
    order = sorted(nodes, key=lambda node: -nodes[node])
    dead: set[tuple[int, tuple[int, ...]]] = set()

    def fill(index: int, left: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        if not any(left):
            return []
        need = sum(size * number for size, number in zip(sizes, left, strict=True))
        if index == len(order) or need > sum(nodes[node] for node in order[index:]):
            return None
        if (index, left) in dead:
            return None
        for filling in _fillings(nodes[order[index]], sizes, left):
            rest = tuple(have - put for have, put in zip(left, filling, strict=True))
            found = fill(index + 1, rest)
            if found is not None:
                return [filling, *found]
        dead.add((index, left))
        return None

    fillings = fill(0, tuple(wanted[size] for size in sizes))
    if fillings is None:
        return None
    placed: dict[str, Counter[int]] = {node: Counter() for node in nodes}
    for node, filling in zip(order, fillings, strict=False):
        placed[node].update({size: put for size, put in zip(sizes, filling, strict=True) if put})
    return placed


def _fillings(room: int, sizes: Sequence[int], left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Maximal fillings of one node, the fullest first."""
    found: list[tuple[int, ...]] = []

    def extend(index: int, free: int, chosen: tuple[int, ...]) -> None:
        if index == len(sizes):
            if not any(
                size <= free and number > put
                for size, number, put in zip(sizes, left, chosen, strict=True)
            ):
                found.append(chosen)
            return
        for number in range(min(left[index], free // sizes[index]), -1, -1):
            extend(index + 1, free - number * sizes[index], (*chosen, number))

    extend(0, room, ())
    found.sort(key=lambda f: -sum(s * n for s, n in zip(sizes, f, strict=True)))
    return iter(found)


def _nodes(devices: Sequence[Device], kind: str, across: bool) -> dict[str, int]:
    names = Counter("" if across else device.node for device in devices if device.kind == kind)
    return dict(sorted(names.items()))


def is_chain(sizes: Sequence[int]) -> bool:
    """Whether each of the ascending sizes divides the next."""
    return all(large % small == 0 for small, large in pairwise(sizes))
