"""Sources that let the busiest link finish as early as possible: a linear programme.

Over x[d, s], the fraction of demand d that its holder s sends, and the time t:

    minimise t  subject to  sum over s of x[d, s] = 1                                (each demand)
                            sum of bytes[d] * x[d, s] over what passes it <= rate * t  (each link)

and, among equals, the fewest bytes between nodes. Its optimum bounds the time of every choice of
sources from below (section 4 of the method allows no relays). Rounding cuts items between sources
at whole layers, then at whole rows, which costs little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from oserve.core import OServeError
from oserve.switch.choice import Copy, split_item
from oserve.switch.demand import Item, ShardDemand
from oserve.switch.links import Links

# The programme leaves out demands below this share of all bytes: norms and scales.
_SMALL = 1e-5
# Cost of a whole demand that travels between nodes, in units of the time.
_ACROSS = 1e-3
# Fractions below this go to the other sources of the demand.
_LEAST_SHARE = 2e-3
# Cutting makes no smaller message.
_LEAST_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """The copies, and a lower bound on the seconds of every choice of sources."""

    copies: tuple[Copy, ...]
    bound_s: float


def balanced_copies(demands: Sequence[ShardDemand], links: Links) -> Balanced:
    """Return copies for all demands, by the programme and rounding."""
    total = sum(demand.size_bytes for demand in demands)
    if not total:
        return Balanced(copies=(), bound_s=0.0)
    large = [demand for demand in demands if demand.size_bytes > total * _SMALL]
    shares, bound_s = _solve(large, links)
    copies: list[Copy] = []
    sent: dict[str, float] = {}
    for demand, share in zip(large, shares, strict=True):
        for name, part in share.items():
            sent[name] = sent.get(name, 0.0) + part * demand.size_bytes
        copies.extend(_rounded(demand, share))
    for demand in demands:
        if demand.size_bytes <= total * _SMALL:
            source = _nearest(demand, links, sent)
            sent[source] = sent.get(source, 0.0) + demand.size_bytes
            copies.extend(Copy(item, source, demand.target) for item in demand.items)
    return Balanced(copies=tuple(copies), bound_s=bound_s)


def lower_bound_s(demands: Sequence[ShardDemand], links: Links) -> float:
    """Return a lower bound on the seconds of every choice of sources without relays."""
    total = sum(demand.size_bytes for demand in demands)
    large = [demand for demand in demands if demand.size_bytes > total * _SMALL]
    return _solve(large, links)[1] if large else 0.0


def _nearest(demand: ShardDemand, links: Links, sent: dict[str, float]) -> str:
    home = links.port(demand.target).node
    return min(
        demand.holders, key=lambda name: (links.port(name).node != home, sent.get(name, 0.0))
    )


def _solve(demands: Sequence[ShardDemand], links: Links) -> tuple[list[dict[str, float]], float]:
    """Return each demand's fractions by source, and the bound in seconds."""
    model = _Model(demands, links)
    values, objective = model.solve()
    shares: list[dict[str, float]] = []
    column = 0
    for demand in demands:
        own = values[column : column + len(demand.holders)]
        column += len(demand.holders)
        kept = {
            name: float(part)
            for name, part in zip(demand.holders, own, strict=True)
            if part > _LEAST_SHARE
        }
        whole = sum(kept.values())
        shares.append({name: part / whole for name, part in kept.items()})
    return shares, objective


class _Model:
    """The programme as arrays. One column per demand and holder, the last one is the time."""

    def __init__(self, demands: Sequence[ShardDemand], links: Links) -> None:
        devices = {name: index for index, name in enumerate(links.ports)}
        nodes = {name: index for index, name in enumerate(links.node_bandwidth)}
        node_of = np.array([nodes[port.node] for port in links.ports.values()])
        outside = np.array(list(links.node_bandwidth.values()))
        rate = np.array([port.bandwidth for port in links.ports.values()])
        size = np.array([float(demand.size_bytes) for demand in demands])
        widths = [len(demand.holders) for demand in demands]
        source = np.array([devices[name] for demand in demands for name in demand.holders])
        own = np.repeat(np.arange(len(demands)), widths)
        target = np.array([devices[demand.target] for demand in demands])[own]
        column = np.arange(len(source))
        across = np.flatnonzero(node_of[source] != node_of[target])
        home, goal = node_of[source][across], node_of[target][across]
        pairs = {(nodes[own], nodes[other]): n for n, (own, other) in enumerate(links.measured)}
        between = np.array(
            [pairs.get(pair, -1) for pair in zip(home.tolist(), goal.tolist(), strict=True)],
            dtype=np.int64,
        )
        known, pace = between >= 0, np.array(list(links.measured.values()))
        passes, between = across[known], between[known]
        # Rows: demands, links out of and into devices, out of and into nodes, between two nodes.
        sizes = [len(demands), len(devices), len(devices), len(nodes), len(nodes), len(pairs)]
        starts = np.cumsum(sizes)
        moved = size[own]
        self._demands, self._columns, self._rows = len(demands), len(source), int(starts[-1])
        rows = [own, starts[0] + source, starts[1] + target, starts[2] + home, starts[3] + goal]
        rows.append(starts[4] + between)
        self._row = np.concatenate(rows).astype(np.int32)
        self._column = np.concatenate([column, column, column, across, across, passes])
        seconds = [
            moved / rate[source],
            moved / rate[target],
            moved[across] / outside[home],
            moved[across] / outside[goal],
            moved[passes] / pace[between],
        ]
        # The unit of time is the longest that one demand alone could take.
        self._unit_s = float(max(part.max(initial=0.0) for part in seconds))
        passed = np.concatenate(seconds) / self._unit_s
        self._value = np.concatenate([np.ones(len(source)), passed])
        self._costs = np.zeros(len(source) + 1)
        self._costs[across] = _ACROSS * moved[across] / size.sum()
        self._costs[-1] = 1.0

    def solve(self) -> tuple[NDArray[np.float64], float]:
        """Return the fractions, and the bound in seconds."""
        # highspy has no types.
        highs: Any = highspy.Highs()
        for name, value in (("output_flag", False), ("threads", 1), ("presolve", "off")):
            highs.setOptionValue(name, value)
        highs.passModel(self._lp())
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise OServeError(
                "the solver found no sources for the transfer",
                place="switch",
                remedy="report it with both plans",
            )
        values = np.array(highs.getSolution().col_value)
        # The tie-break may have added this much to the objective.
        bound = float(highs.getInfo().objective_function_value) - _ACROSS
        return values[:-1], bound * self._unit_s

    def _lp(self) -> Any:
        order = np.lexsort((self._row, self._column))
        links = np.arange(self._demands, self._rows, dtype=np.int32)
        counts = np.bincount(self._column, minlength=self._columns)
        lp: Any = highspy.HighsLp()
        lp.num_col_ = self._columns + 1
        lp.num_row_ = self._rows
        lp.col_cost_ = self._costs
        lp.col_lower_ = np.zeros(self._columns + 1)
        lp.col_upper_ = np.full(self._columns + 1, highspy.kHighsInf)
        demands, ways = np.ones(self._demands), len(links)
        lp.row_lower_ = np.concatenate([demands, np.full(ways, -highspy.kHighsInf)])
        lp.row_upper_ = np.concatenate([demands, np.zeros(ways)])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        starts = np.concatenate([[0], np.cumsum(counts)])
        lp.a_matrix_.start_ = np.append(starts, starts[-1] + ways).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([self._row[order], links])
        lp.a_matrix_.value_ = np.concatenate([self._value[order], -np.ones(ways)])
        return lp


def _rounded(demand: ShardDemand, shares: dict[str, float]) -> list[Copy]:
    """Deal the demand's items to its sources in order, and cut where a share ends."""
    copies: list[Copy] = []
    items: list[Item] = list(reversed(demand.items))
    names = sorted(shares, key=shares.__getitem__)
    for name in names[:-1]:
        left = shares[name] * demand.size_bytes
        while items and left > 0:
            item = items.pop()
            if item.size_bytes <= left:
                taken, rest = [item], list[Item]()
            else:
                taken, rest = split_item(item, left, _LEAST_BYTES)
            copies.extend(Copy(part, name, demand.target) for part in taken)
            left = left - item.size_bytes if not rest else 0.0
            items.extend(reversed(rest))
    copies.extend(Copy(item, names[-1], demand.target) for item in reversed(items))
    return copies
