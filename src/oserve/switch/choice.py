"""Copies: which device sends which box to which, and the paper's rule for choosing senders."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from oserve.switch.demand import Demands, Item, ShardDemand, item_of
from oserve.switch.links import Links, LinkTraffic
from oserve.switch.tensor import Box


@dataclass(frozen=True, slots=True)
class Copy:
    """A box of a tensor, the same in each layer of the item's range, from device to device."""

    item: Item
    source: str
    target: str


def local_copies(demands: Demands) -> tuple[Copy, ...]:
    """Return copies of what the targets' own devices hold."""
    return tuple(
        Copy(item, demand.target, demand.target)
        for demand in demands.local
        for item in demand.items
    )


def traffic_of(copies: Iterable[Copy]) -> LinkTraffic:
    """Return bytes by pair of devices, and inside devices."""
    pairs: dict[tuple[str, str], int] = {}
    local: dict[str, int] = {}
    for copy in copies:
        size = copy.item.size_bytes
        if copy.source == copy.target:
            local[copy.target] = local.get(copy.target, 0) + size
        else:
            pair = copy.source, copy.target
            pairs[pair] = pairs.get(pair, 0) + size
    return LinkTraffic(pairs=pairs, local=local)


def greedy_copies(demands: Sequence[ShardDemand], links: Links) -> tuple[Copy, ...]:
    """Choose sources as the paper does (section 4): shard by shard, device by device.

    A shard is a tensor's cell in one layer. Holders on the target's node come first; among them the
    one with the fewest bytes to send so far.
    """
    sent: dict[str, int] = {}
    copies: list[Copy] = []
    for demand in demands:
        near = links.port(demand.target).node
        close = [name for name in demand.holders if links.port(name).node == near]
        choices = close or list(demand.holders)
        for item in demand.items:
            size = item.layer_bytes
            chosen = []
            for _ in range(*item.layers):
                source = min(choices, key=lambda name: sent.get(name, 0))
                sent[source] = sent.get(source, 0) + size
                chosen.append(source)
            copies.extend(_runs(item, chosen, demand.target))
    return tuple(copies)


def _runs(item: Item, chosen: Sequence[str], target: str) -> Iterable[Copy]:
    """Join consecutive layers from one source in one copy."""
    first = item.layers[0]
    starts = [
        0,
        *(index + 1 for index, (one, other) in enumerate(pairwise(chosen)) if one != other),
        len(chosen),
    ]
    for start, stop in pairwise(starts):
        part = _layers(item, first + start, first + stop)
        yield Copy(part, chosen[start], target)


def split_item(item: Item, wanted_bytes: float, least_bytes: int) -> tuple[list[Item], list[Item]]:
    """Split an item; the first part has about ``wanted_bytes``: whole layers, then whole rows.

    The last of several dimensions is never cut, so that each row stays in one piece (and packed
    words and groups of weights stay whole). Parts smaller than ``least_bytes`` are not made.
    """
    first, last = item.layers
    layers = min(last - first, int(wanted_bytes // item.layer_bytes))
    taken = [_layers(item, first, first + layers)] if layers else []
    rest = [_layers(item, first + layers + 1, last)]
    rest = rest if first + layers + 1 < last else []
    if first + layers == last:
        return taken, rest
    left = wanted_bytes - layers * item.layer_bytes
    one = (first + layers, first + layers + 1)
    if left < least_bytes:
        return taken, [_layers(item, *one), *rest]
    inside, outside = _split_box(item.box, left / item.tensor.value_bytes)
    taken += [item_of(item.tensor, one, box) for box in inside]
    return taken, [item_of(item.tensor, one, box) for box in outside] + rest


def _layers(item: Item, start: int, stop: int) -> Item:
    return Item(item.tensor, (start, stop), item.box, item.layer_bytes)


def _split_box(box: Box, wanted: float) -> tuple[list[Box], list[Box]]:
    """Return boxes of about ``wanted`` values, and the others."""
    inside: list[Box] = []
    outside: list[Box] = []
    left = box
    for dim in range(max(1, len(box) - 1)):
        start, stop = left[dim]
        values = 1
        for index, (low, high) in enumerate(left):
            values *= 1 if index == dim else high - low
        count = min(stop - start, int(wanted // values))
        if count:
            inside.append((*left[:dim], (start, start + count), *left[dim + 1 :]))
            wanted -= count * values
        if start + count == stop:
            return inside, outside
        if start + count + 1 < stop:
            outside.append((*left[:dim], (start + count + 1, stop), *left[dim + 1 :]))
        left = (*left[:dim], (start + count, start + count + 1), *left[dim + 1 :])
    outside.append(left)
    return inside, outside
