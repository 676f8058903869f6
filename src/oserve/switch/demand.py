"""Demands: what each device wants, gathered by the devices that hold it.

The cuts of all layouts together divide each tensor into cells, and the boundaries of all pipeline
stages divide the layers into segments; all bytes of a cell in a segment have the same holders and
are wanted by the same devices. A *demand* is all that one device wants of one set of holders. Tens
of demands stand for tens of thousands of shards, so choosing sources is a small problem.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from oserve.core import OServeError
from oserve.switch.layout import Contents, ShardPlacement
from oserve.switch.tensor import Box, Range, TensorSpec, Where, volume


@dataclass(frozen=True, slots=True)
class Item:
    """A box of a tensor, the same in each of the layers of a range; bytes are of one layer."""

    tensor: TensorSpec
    layers: Range
    box: Box
    layer_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes in all of its layers."""
        return (self.layers[1] - self.layers[0]) * self.layer_bytes


def item_of(tensor: TensorSpec, layers: Range, box: Box) -> Item:
    """Return an item, with its bytes."""
    return Item(tensor, layers, box, volume(box) * tensor.value_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDemand:
    """Items that ``target`` wants and each of ``holders`` has."""

    target: str
    holders: tuple[str, ...]
    items: tuple[Item, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """``remote`` must travel; ``local`` is on the target's own device."""

    remote: tuple[ShardDemand, ...]
    local: tuple[ShardDemand, ...]


def demands_of(
    contents: Contents, sources: Sequence[ShardPlacement], targets: Sequence[ShardPlacement]
) -> Demands:
    """Return what the targets' layouts want of the sources'; each byte is in exactly one demand.

    Raises OServeError if a device has two targets, or if no source holds some byte.
    """
    _check_devices(targets)
    return _Gathering(contents, sources, targets).demands()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """The boxes of a tensor's cells; for each way to cut it, each rank's cells."""

    boxes: tuple[Box, ...]
    of_rank: Mapping[tuple[int, bool], tuple[tuple[int, ...], ...]]


class _Gathering:
    """Holders and takers as bit masks over devices, computed once per kind of tensor."""

    def __init__(
        self,
        contents: Contents,
        sources: Sequence[ShardPlacement],
        targets: Sequence[ShardPlacement],
    ) -> None:
        self._contents = contents
        self._sources = sources
        self._targets = targets
        names = dict.fromkeys(name for placed in (*sources, *targets) for name in placed.devices)
        self._names = tuple(names)
        self._bit = {name: 1 << index for index, name in enumerate(self._names)}
        self._masks: dict[object, list[tuple[Range, int, int, int]]] = {}
        self._named: dict[int, tuple[str, ...]] = {}

    def demands(self) -> Demands:
        remote: dict[tuple[int, int], list[Item]] = {}
        local: dict[tuple[int, int], list[Item]] = {}
        for tensor, sources, targets in self._tensors():
            cells = _cells(tensor, (*sources, *targets))
            sizes = [volume(box) * tensor.value_bytes for box in cells.boxes]
            for layers, cell, held, wanted in self._segments(tensor, cells, sources, targets):
                item = Item(tensor, layers, cells.boxes[cell], sizes[cell])
                if not held:
                    raise OServeError(
                        f"no running replica holds {tensor.name} ({tensor.dtype})",
                        place="switch",
                        remedy="keep a source of that precision running, or reload from disk",
                    )
                for bit in _bits(wanted):
                    if bit & held:
                        local.setdefault((bit, bit), []).append(item)
                    else:
                        remote.setdefault((bit, held), []).append(item)
        return Demands(remote=self._made(remote), local=self._made(local))

    def _made(self, found: dict[tuple[int, int], list[Item]]) -> tuple[ShardDemand, ...]:
        return tuple(
            ShardDemand(
                target=self._devices(bit)[0],
                holders=self._devices(held),
                items=tuple(items),
                size_bytes=sum(item.size_bytes for item in items),
            )
            for (bit, held), items in found.items()
        )

    def _devices(self, mask: int) -> tuple[str, ...]:
        if mask not in self._named:
            self._named[mask] = tuple(
                name for index, name in enumerate(self._names) if mask >> index & 1
            )
        return self._named[mask]

    def _tensors(
        self,
    ) -> list[tuple[TensorSpec, tuple[ShardPlacement, ...], tuple[ShardPlacement, ...]]]:
        """Return each wanted tensor, the sources that hold it and the targets that want it."""
        keys = {
            held: {
                part.key: part
                for parameter in self._contents.parameters(held)
                for part in parameter.parts
            }
            for held in {placed.layout.held for placed in (*self._sources, *self._targets)}
        }
        wanted = {}
        for placed in self._targets:
            wanted.update(keys[placed.layout.held])
        return [
            (
                tensor,
                tuple(one for one in self._sources if key in keys[one.layout.held]),
                tuple(one for one in self._targets if key in keys[one.layout.held]),
            )
            for key, tensor in wanted.items()
        ]

    def _segments(
        self,
        tensor: TensorSpec,
        cells: _Cells,
        sources: tuple[ShardPlacement, ...],
        targets: tuple[ShardPlacement, ...],
    ) -> list[tuple[Range, int, int, int]]:
        """Return (layers, cell, holders, takers) of all cells that a target wants."""
        names = tuple(one.replica for one in sources), tuple(one.replica for one in targets)
        # Most tensors are cut alike (q, o, gate, up and down, say).
        alike = (tensor.where, names, tuple(cells.of_rank.items()))
        if alike not in self._masks:
            segments = self._layer_segments(tensor.where, (*sources, *targets))
            count = len(cells.boxes)
            held = self._mask(tensor.where, cells, sources, segments)
            wanted = self._mask(tensor.where, cells, targets, segments)
            self._masks[alike] = [
                (layers, cell, held[index * count + cell], wanted[index * count + cell])
                for index, layers in enumerate(segments)
                for cell in range(count)
                if wanted[index * count + cell]
            ]
        return self._masks[alike]

    def _layer_segments(self, where: Where, placed: Sequence[ShardPlacement]) -> list[Range]:
        bounds = {
            bound
            for size in {one.layout.pipeline_parallel_size for one in placed}
            for _, layers in self._contents.stages(where, size)
            for bound in layers
        }
        return list(pairwise(sorted(bounds)))

    def _mask(
        self,
        where: Where,
        cells: _Cells,
        placed: Sequence[ShardPlacement],
        segments: Sequence[Range],
    ) -> list[int]:
        """Return the devices that hold a cell, by segment and cell."""
        count = len(cells.boxes)
        masks = [0] * (len(segments) * count)
        for one in placed:
            layout = one.layout
            width = layout.tensor_parallel_size
            ranks = cells.of_rank[width, layout.expert_parallel]
            for stage, layers in self._contents.stages(where, layout.pipeline_parallel_size):
                bits = [self._bit[name] for name in one.devices[stage * width :][:width]]
                for index, segment in enumerate(segments):
                    if layers[0] <= segment[0] and segment[1] <= layers[1]:
                        for bit, own in zip(bits, ranks, strict=True):
                            for cell in own:
                                masks[index * count + cell] |= bit
        return masks


def _cells(tensor: TensorSpec, placed: Sequence[ShardPlacement]) -> _Cells:
    ways = {(one.layout.tensor_parallel_size, one.layout.expert_parallel) for one in placed}
    return _cells_of(tensor, tuple(sorted(ways)))


@functools.lru_cache(maxsize=4096)
def _cells_of(tensor: TensorSpec, ways: tuple[tuple[int, bool], ...]) -> _Cells:
    boxes = {
        way: [tensor.box_of(rank, way[0], expert_parallel=way[1])[0] for rank in range(way[0])]
        for way in ways
    }
    edges = [
        list(pairwise(sorted({edge for own in boxes.values() for box in own for edge in box[dim]})))
        for dim in range(len(tensor.shape))
    ]
    cells = tuple(product(*edges))
    return _Cells(
        boxes=cells,
        of_rank={
            way: tuple(
                tuple(index for index, cell in enumerate(cells) if _within(cell, box))
                for box in own
            )
            for way, own in boxes.items()
        },
    )


def _within(cell: Box, box: Box) -> bool:
    return all(a <= c and d <= b for (c, d), (a, b) in zip(cell, box, strict=True))


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low)
        mask ^= low
    return found


def _check_devices(targets: Sequence[ShardPlacement]) -> None:
    seen: set[str] = set()
    for placed in targets:
        twice = seen.intersection(placed.devices)
        if twice:
            raise OServeError(
                f"two replicas want the device {min(twice)}",
                place="plan.replicas",
                remedy="give each device to one replica",
            )
        seen.update(placed.devices)
