"""A transfer plan as what each rank of each engine has to do: parts of parameters to and fro.

Ranks are numbered through all engines that take part. Parts are by the engines' parameter names and
local indices. It does not know how bytes are carried.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from oserve.core import OServeError, Precision
from oserve.switch.choice import Copy
from oserve.switch.layout import Architecture, ShardPlacement, pieces_by_key, place_of, shard_map
from oserve.switch.transfer import TransferPlan

# A parameter's name, and start and stop in each dimension of the rank's own.
Part = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(kw_only=True)
class RankOrder:
    """What one rank does; peers are numbers of ranks.

    ``staged``: parameters that come in another form than the engine's, with shape and type;
    ``convert``: (name, ``int8`` or ``cast``, ranks that share rows of it, this one among them).
    """

    replica: str
    rank: int
    sends: dict[int, list[Part]] = field(default_factory=dict)
    receives: dict[int, list[Part]] = field(default_factory=dict)
    staged: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    convert: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)


def rank_orders(
    architecture: Architecture,
    plan: TransferPlan,
    sources: Sequence[ShardPlacement],
    targets: Sequence[ShardPlacement],
) -> tuple[RankOrder, ...]:
    """One for each rank of all sources and targets, each at its number.

    Raises OServeError for a conversion that engines cannot do.
    """
    made = _Making(architecture, plan, sources, targets)
    for copy in (*plan.copies, *plan.kept):
        made.add(copy)
    made.convert()
    return tuple(made.orders)


class _Making:
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
        self._givers = self._numbered(sources)
        self._takers = self._numbered(plan.received)

    def _numbered(
        self, placed: Sequence[ShardPlacement]
    ) -> dict[str, tuple[int, ShardPlacement, int]]:
        """Each device's rank: its number, its replica and its rank there."""
        found = {}
        for one in placed:
            for rank, device in enumerate(one.devices):
                found[device] = (len(self.orders), one, rank)
                self.orders.append(RankOrder(replica=one.replica, rank=rank))
        return found

    def add(self, copy: Copy) -> None:
        """A copy, layer by layer."""
        giver, source, source_rank = self._givers[copy.source]
        taker, target, target_rank = self._takers[copy.target]
        sent = self._parts(source, source_rank, copy)
        got = self._parts(target, target_rank, copy)
        self.orders[giver].sends.setdefault(taker, []).extend(sent)
        self.orders[taker].receives.setdefault(giver, []).extend(got)

    def _parts(self, placed: ShardPlacement, rank: int, copy: Copy) -> list[Part]:
        pieces = pieces_of(self._architecture, placed.layout, rank)
        parameter, piece = pieces[copy.item.tensor.key]
        box = tuple((edge.start, edge.stop) for edge in place_of(piece, copy.item.box))
        return [(_named(parameter.name, layer), box) for layer in range(*copy.item.layers)]

    def convert(self) -> None:
        """What becomes of parts that came in another form."""
        for conversion in self._plan.conversions:
            number, target, rank = self._takers[conversion.target]
            order = self.orders[number]
            scheme = "cast"
            if not conversion.cast:
                scheme = conversion_scheme(self._precision[conversion.replica])
            peers = tuple(self._takers[device][0] for device in conversion.peers) or (number,)
            held = shard_map(self._architecture, target.layout, rank)
            for layer in range(*conversion.layers):
                name = _named(conversion.parameter, layer)
                local = held[name]
                order.staged[name] = (local.shape, local.parameter.parts[0].dtype)
                order.convert.append((name, scheme, peers))


pieces_of = functools.lru_cache(maxsize=256)(pieces_by_key)


def _named(name: str, layer: int) -> str:
    return name.replace("{}", str(layer))


def conversion_scheme(precision: Precision) -> str:
    """Return how engines make weights of a precision. Raises OServeError if they cannot."""
    if precision is not Precision.INT8:
        raise OServeError(
            f"engines cannot make {precision} weights on the way",
            place="switch",
            remedy="keep a replica of that precision running, or reload from disk",
        )
    return "int8"
