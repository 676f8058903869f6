"""From a transfer plan to the orders of single ranks.

Orders name parts by the engines' parameter names and by local indices. How bytes are carried is the
engines' business.
"""

import functools
from collections.abc import Sequence
from typing import Literal

from oserve.core import OServeError, Precision
from oserve.switch.choice import Copy
from oserve.switch.layout import Architecture, ShardPlacement, pieces_by_key, place_of, shard_map
from oserve.switch.rank_order import RankOrder, ShardConversion, ShardPart, StagedTensor
from oserve.switch.transfer import TransferPlan


def rank_orders(
    architecture: Architecture,
    plan: TransferPlan,
    sources: Sequence[ShardPlacement],
    targets: Sequence[ShardPlacement],
) -> tuple[RankOrder, ...]:
    """One order for each rank of all sources and targets; a rank's number is its place here.

    Raises OServeError for a conversion that engines cannot do.
    """
    builder = _OrderBuilder(architecture, plan, sources, targets)
    for copy in (*plan.copies, *plan.kept):
        builder.add(copy)
    builder.add_conversions()
    return tuple(builder.orders)


class _OrderBuilder:
    def __init__(
        self,
        architecture: Architecture,
        plan: TransferPlan,
        sources: Sequence[ShardPlacement],
        targets: Sequence[ShardPlacement],
    ) -> None:
        self._architecture = architecture
        self._plan = plan
        self._precision = {one.replica: one.layout.held.precision for one in targets}
        self.orders: list[RankOrder] = []
        self._sources = self._numbered(sources)
        self._targets = self._numbered(plan.received)

    def _numbered(
        self, placed: Sequence[ShardPlacement]
    ) -> dict[str, tuple[int, ShardPlacement, int]]:
        """By device: its rank's number, the replica, and its rank in the replica."""
        found = {}
        for one in placed:
            for rank, device in enumerate(one.devices):
                found[device] = (len(self.orders), one, rank)
                self.orders.append(RankOrder(replica=one.replica, rank=rank))
        return found

    def add(self, copy: Copy) -> None:
        """Add one copy to both ends, layer by layer."""
        sender, source, source_rank = self._sources[copy.source]
        receiver, target, target_rank = self._targets[copy.target]
        sent = self._parts(source, source_rank, copy)
        received = self._parts(target, target_rank, copy)
        self.orders[sender].sends.setdefault(receiver, []).extend(sent)
        self.orders[receiver].receives.setdefault(sender, []).extend(received)

    def _parts(self, placed: ShardPlacement, rank: int, copy: Copy) -> list[ShardPart]:
        pieces = pieces_of(self._architecture, placed.layout, rank)
        parameter, piece = pieces[copy.item.tensor.key]
        box = tuple((edge.start, edge.stop) for edge in place_of(piece, copy.item.box))
        return [ShardPart(_named(parameter.name, layer), box) for layer in range(*copy.item.layers)]

    def add_conversions(self) -> None:
        """Say what becomes of parameters that arrive in another form."""
        for conversion in self._plan.conversions:
            number, target, rank = self._targets[conversion.target]
            order = self.orders[number]
            scheme: Literal["int8", "cast"] = "cast"
            if not conversion.cast:
                scheme = conversion_scheme(self._precision[conversion.replica])
            peers = tuple(self._targets[device][0] for device in conversion.peers) or (number,)
            held = shard_map(self._architecture, target.layout, rank)
            for layer in range(*conversion.layers):
                name = _named(conversion.parameter, layer)
                local = held[name]
                order.staged[name] = StagedTensor(local.shape, local.parameter.parts[0].dtype)
                order.convert.append(ShardConversion(name, scheme, peers))


pieces_of = functools.lru_cache(maxsize=256)(pieces_by_key)


def _named(name: str, layer: int) -> str:
    return name.replace("{}", str(layer))


def conversion_scheme(precision: Precision) -> Literal["int8"]:
    """Return how engines make weights of a precision. Raises OServeError if they cannot."""
    if precision is not Precision.INT8:
        raise OServeError(
            f"engines cannot convert weights to {precision} during a transfer",
            place="switch",
            remedy="keep a replica of that precision running, or reload from disk",
        )
    return "int8"
