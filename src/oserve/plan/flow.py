"""The lower level as the paper's flow network, solved by preflow-push in exact arithmetic.

The network (paper, section 3): source -> type j with capacity rate[j]; type j -> replica k; replica
k -> sink with capacity M_k = lcm over j of capacity[k, j], in units in which mixed work adds up:
one request of type j takes M_k / capacity[k, j] units of replica k.

Flow therefore changes its amount between a type and a replica: these arcs have *gains*, and the
network is a generalised one. Normalising by M_k makes the numbers whole but does not remove the
gains. Relabelling (a unit of flow at node v redefined as label[v] requests) removes them only if
capacity[k, j] = a[k] * b[j] for all replicas and types, that is, if one replica is uniformly faster
than another. Different shapes suit different types precisely because this is false, and even then a
plain maximum would be one of work, not of requests. A plain maximum flow is exact only on arcs
whose relabelled gain is 1.

This module uses it in that way, in the highest-gain method (Truemper, "On max flows with gains and
pure min-cost flows"; the flow is read from replicas to requests, so that the gain of an arc is
requests per unit). In each phase label[v] is the most requests that a unit at v can become along a
residual path (give back flow, serve another type instead), and after relabelling no arc gains. The
arcs without loss form a plain network. Its maximum flow, by preflow-push, uses up all paths of that
gain at once and creates no path of higher gain. When no replica with spare capacity reaches
unserved requests, the flow serves the most requests possible, like the linear programme; each
checks the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from oserve.plan.network import Arc, max_flow

# Rates and capacities are rounded to whole multiples of 1 / GRAIN requests per second.
GRAIN = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A maximum flow. ``rates_rps[k][j]`` is served by all replicas of option k together.

    ``units[k]`` is M_k, in multiples of 1 / GRAIN, and ``used_units[k]`` the flow's part of
    ``counts[k] * M_k``. ``phases`` counts the plain maximum flows.
    """

    served_rps: float
    rates_rps: tuple[tuple[float, ...], ...]
    units: tuple[int, ...]
    used_units: tuple[float, ...]
    phases: int


def served_by_flow(
    *,
    capacity_rps: Sequence[Sequence[float]],
    counts: Sequence[int],
    rates_rps: Sequence[float],
) -> Flow:
    """The most requests per second that ``counts[k]`` replicas of each option k can serve.

    ``capacity_rps[k][j]`` is the capacity of one of them for type j alone, ``rates_rps[j]`` the
    arrival rate of type j. All finite and at least 0.
    """
    network = _GainNetwork(
        capacity=[[round(value * GRAIN) for value in row] for row in capacity_rps],
        counts=counts,
        rates=[Fraction(round(rate * GRAIN), GRAIN) for rate in rates_rps],
    )
    phases = 0
    while network.phase():
        phases += 1
    rates = [[network.served(k, j) for j in range(len(rates_rps))] for k in range(len(counts))]
    return Flow(
        served_rps=float(sum(sum(row, Fraction()) for row in rates)),
        rates_rps=tuple(tuple(float(rate) for rate in row) for row in rates),
        units=tuple(network.units),
        used_units=tuple(
            float(count * unit - spare)
            for count, unit, spare in zip(counts, network.units, network.spare, strict=True)
        ),
        phases=phases,
    )


class _GainNetwork:
    """Replicas' spare units, types' unserved requests, and the flow between them.

    A unit of replica k becomes ``gain[k, j]`` requests of type j.
    """

    def __init__(
        self,
        *,
        capacity: Sequence[Sequence[int]],
        counts: Sequence[int],
        rates: Sequence[Fraction],
    ) -> None:
        self.units = [lcm(*[value for value in row if value]) for row in capacity]
        self.gain = {
            (k, j): Fraction(value, self.units[k] * GRAIN)
            for k, row in enumerate(capacity)
            for j, value in enumerate(row)
            if value and counts[k] and rates[j]
        }
        self.spare = [
            Fraction(count * unit) for count, unit in zip(counts, self.units, strict=True)
        ]
        self.unserved = list(rates)
        self._flow = {pair: Fraction() for pair in self.gain}

    def served(self, k: int, j: int) -> Fraction:
        """Requests per second of type j at the replicas of option k."""
        return self._flow.get((k, j), Fraction())

    def phase(self) -> bool:
        """Run a plain maximum flow on the arcs without loss; False if nothing can flow."""
        by_replica, by_type = self._labels()
        if not any(spare and by_replica[k] for k, spare in enumerate(self.spare)):
            return False
        options, types = len(self.spare), len(self.unserved)
        source, sink = options + types, options + types + 1
        pipes: list[tuple[int, int, Fraction]] = []
        for k, spare in enumerate(self.spare):
            pipes.append((source, k, spare * by_replica[k]))
        open_end = sum((capacity for _, _, capacity in pipes), Fraction())
        for j, unserved in enumerate(self.unserved):
            if by_type[j] == 1:
                pipes.append((options + j, sink, unserved))
        tight = [
            pair
            for pair, gain in self.gain.items()
            if by_type[pair[1]] and gain * by_type[pair[1]] == by_replica[pair[0]]
        ]
        first = len(pipes)
        for k, j in tight:
            # Served flow may return and be replaced by flow of the same gain.
            back = self._flow[k, j] * by_type[j]
            pipes += [(k, options + j, open_end + back), (options + j, k, back)]
        flows = _plain_flow(pipes, source, sink)
        for k in range(options):
            if by_replica[k]:
                self.spare[k] -= flows[k] / by_replica[k]
        for index, (k, j) in enumerate(tight):
            net = (flows[first + 2 * index] - flows[first + 2 * index + 1]) / by_type[j]
            self._flow[k, j] += net
            self.unserved[j] -= net
        return True

    def _labels(self) -> tuple[list[Fraction], list[Fraction]]:
        """Per replica and per type: the most unserved requests a unit (a request) can become.

        Along residual paths only: from a replica to a type, and from a type back to a replica that
        serves it now. No cycle has a gain, so as many rounds as nodes suffice.
        """
        by_type = [Fraction(1 if unserved else 0) for unserved in self.unserved]
        by_replica = [Fraction()] * len(self.spare)
        changed = True
        while changed:
            changed = False
            for (k, j), gain in self.gain.items():
                if gain * by_type[j] > by_replica[k]:
                    by_replica[k] = gain * by_type[j]
                    changed = True
            for (k, j), gain in self.gain.items():
                if self._flow[k, j] and by_replica[k] > by_type[j] * gain:
                    by_type[j] = by_replica[k] / gain
                    changed = True
        return by_replica, by_type


def _plain_flow(
    pipes: Sequence[tuple[int, int, Fraction]], source: int, sink: int
) -> list[Fraction]:
    """Maximum flow with fractional capacities, scaled to integers by their common denominator."""
    whole = lcm(*[capacity.denominator for _, _, capacity in pipes])
    arcs = [
        Arc(tail=tail, head=head, capacity=int(capacity * whole)) for tail, head, capacity in pipes
    ]
    _, flows = max_flow(arcs, node_count=sink + 1, source=source, sink=sink)
    return [Fraction(flow, whole) for flow in flows]
