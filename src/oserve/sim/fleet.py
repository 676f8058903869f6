"""A fleet of simulated replicas behind a simulated gateway, which can be paused at any time.

The engine model is vLLM's V1 scheduler with step times from a performance model; see ``schedule``.
Results are exact to the picosecond, with and without numba. Like the live router, routers know
only ``expected_output_tokens`` of a request's output.
"""

import math
from collections.abc import Mapping

import numpy as np

from oserve.control.dispatch.fair_policy import tight_inflight
from oserve.control.routing import INFLIGHT_PER_SEQ
from oserve.core import ReplicaShape, Role
from oserve.perf import TokenCosts
from oserve.perf.sequence_cache import SequenceCache
from oserve.sim import entry, layout, readout
from oserve.sim.arrays import fleet_arrays, picoseconds, replica_rows
from oserve.sim.compiled import HAS_NUMBA
from oserve.sim.rebalance import rebalance as rebalance_once
from oserve.sim.results import FleetResults, ReplicaTotals
from oserve.sim.state import KernelState
from oserve.sim.steps import StepTables
from oserve.sim.types import (
    FleetObservation,
    GatewayOptions,
    Ints,
    Rebalance,
    ReplicaObservation,
    RequestTable,
    RoutingPolicy,
    SimLink,
)


class SimulatedFleet:
    """Requests, a gateway and replicas on their own clock, which starts at 0 s.

    ``classes`` bounds ``class_index`` of the requests. ``closed_loop``: the number of requests in
    flight at any time, regardless of arrival times; the next arrives when one ends. ``compiled`` of
    ``False`` runs without numba, ``skip`` of ``False`` step by step: neither changes any result.
    """

    def __init__(
        self,
        requests: RequestTable,
        *,
        classes: int = 1,
        gateway: GatewayOptions | None = None,
        closed_loop: int = 0,
        rebalance: Rebalance | None = None,
        compiled: bool | None = None,
        skip: bool = True,
    ) -> None:
        count = len(requests)
        if count and not 0 <= requests.class_index.min() <= requests.class_index.max() < classes:
            raise ValueError("class_index must lie in [0, classes)")
        self._options = options = gateway or GatewayOptions()
        if closed_loop > 0 and options.shed_after_s is not None:
            raise ValueError("a closed loop does not shed: its clients wait")
        self._requests = requests
        self._classes = classes
        self._skip = int(skip)
        self._rebalance = rebalance
        self._rounds = 0
        self._names: list[str] = []
        self._roles: list[Role] = []
        self._reported = 0
        self._dirty = False
        self._shares: Mapping[int, Mapping[str, float]] = {}
        arrays = fleet_arrays(requests, options, classes=classes, closed_loop=closed_loop)
        self._kernel = entry.Kernel(arrays, compiled=HAS_NUMBA and compiled is not False)

    @property
    def _state(self) -> KernelState:
        return self._kernel.state

    @property
    def now_s(self) -> float:
        """The current time, in seconds."""
        return float(self._state.glob[layout.NOW] / layout.PS)

    @property
    def ended(self) -> int:
        """Requests that have ended, with any status."""
        return int(self._state.glob[layout.ENDED])

    @property
    def queued(self) -> int:
        """Requests that wait at the gateway."""
        return int(self._state.glob[layout.WAITS])

    def add_replica(
        self,
        name: str,
        shape: ReplicaShape,
        steps: StepTables,
        *,
        kv_tokens: int,
        costs: TokenCosts,
        ready_at_s: float = 0.0,
        ordered: bool = False,
        max_inflight: int | None = None,
        max_prompt_s: float = math.inf,
        kv_bytes_per_token: float = 0.0,
        link: SimLink | None = None,
        cache: SequenceCache | None = None,
    ) -> None:
        """Add a replica that loads until ``ready_at_s``; ``shape.role`` is its role.

        ``ordered``: its engine serves by rank, not first come. ``costs`` are the router's estimate
        of its speed. The gateway sends it at most ``max_inflight`` requests (default: twice its
        sequences), and none while it owes ``max_prompt_s`` of prompts. ``link`` carries its KV.
        ``cache``: how sequences take its KV cache, where that is not by ``kv_tokens``.
        Raises ValueError for a name in use, or invalid limits.
        """
        if name in self._names and self._phase(name) != layout.GONE:
            raise ValueError(f"there is a replica {name} already")
        index, state = len(self._names), self._state
        ready_at = max(picoseconds(ready_at_s), state.glob[layout.NOW])
        most = max_inflight or INFLIGHT_PER_SEQ * shape.max_num_seqs
        fair = self._options.fair
        rows = replica_rows(
            index,
            shape,
            steps,
            kv_tokens=kv_tokens,
            ordered=ordered,
            max_inflight=most,
            tight=(most, most) if fair is None else tight_inflight(most, fair.reserve),
            max_prompt=picoseconds(max_prompt_s),
            ready_at=ready_at,
            kv_bytes_per_token=kv_bytes_per_token,
            link=link or SimLink(),
            cache=cache,
        )
        if ready_at == state.glob[layout.NOW]:
            rows[layout.PHASE], rows[layout.DUE] = layout.READY, layout.NEVER
        own = [costs.prefill_s_per_token, costs.decode_s_per_token]
        self._names.append(name)
        self._roles.append(shape.role)
        whole = np.zeros(index + 1, dtype=np.int64)
        self._kernel.change(
            {
                "mem": np.concatenate([readout.as_array(state.mem), rows]),
                "where": np.append(readout.as_array(state.where), len(state.mem)),
                "costs": np.append(np.asarray(state.costs, dtype=np.float64), own),
                **dict.fromkeys(("inflight", "most", "fits"), whole),
                **dict.fromkeys(("work", "own"), np.zeros(index + 1)),
            }
        )
        self._state.glob[layout.REPLICAS] = index + 1
        self._share(keep_credit=True)
        self._dirty = True

    def drain(self, name: str) -> None:
        """Dispatch no more requests to it; its running ones complete. No effect if it has ended."""
        if name not in self._names:
            return
        place = self._place(name)
        phase = self._state.mem[place + layout.PHASE]
        if phase == layout.LOADING:
            self._state.mem[place + layout.DUE] = layout.NEVER
        if phase in {layout.LOADING, layout.READY}:
            self._state.mem[place + layout.PHASE] = layout.DRAINING
            self._dirty = True

    def serve(self, name: str) -> None:
        """Make a loading replica ready now. No effect on a replica in another phase."""
        if name in self._names and self._phase(name) == layout.LOADING:
            place = self._place(name)
            self._state.mem[place + layout.PHASE] = layout.READY
            self._state.mem[place + layout.DUE] = layout.NEVER
            self._dirty = True

    def hang(self, name: str) -> None:
        """Make it hang: it accepts requests, but none of its requests makes progress."""
        if name in self._names and self._phase(name) != layout.GONE:
            self._kernel.run(entry.HANG, self._index(name), self._state.glob[layout.NOW])
            self._dirty = True

    def remove(self, name: str, *, replay: bool = True) -> None:
        """Remove it at once: its requests migrate with the tokens they have, or fail."""
        if name not in self._names or self._phase(name) == layout.GONE:
            return
        now = self._state.glob[layout.NOW]
        self._kernel.run(entry.REMOVE, self._index(name), int(replay), now)
        self._dirty = True

    def set_routing(
        self,
        policy: RoutingPolicy = RoutingPolicy.POOLS,
        shares: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """``shares[class][replica]`` are fractions; future replicas may be named.

        A share below 0 bars a replica from the class, which 0 leaves to overflow.
        """
        self._state.glob[layout.POLICY] = int(policy)
        self._shares = {kind: dict(row) for kind, row in (shares or {}).items()}
        self._share(keep_credit=False)
        self._dirty = True

    def migrate(self, request: int, to: str) -> bool:
        """Move a running request to another replica while it decodes; False if it cannot be.

        It pauses for the link's latency and for the KV that was computed during the copy. It stays
        if it ends before, or if the target then no longer takes requests.
        """
        now = self._state.glob[layout.NOW]
        target = self._index(to)
        return bool(self._kernel.run(entry.MIGRATE, request, target, now))

    def advance(self, until_s: float) -> None:
        """Simulate up to and including that time. Times in the past have no effect."""
        end = picoseconds(until_s)
        if self._rebalance is not None:
            step = picoseconds(self._rebalance.interval_s)
            while (self._rounds + 1) * step <= end:
                self._rounds += 1
                self._advance(self._rounds * step)
                rebalance_once(self, self._rebalance)
        self._advance(end)

    def run(self, limit_s: float = math.inf) -> None:
        """Advance until all requests have ended or no event is due, at most to ``limit_s``."""
        limit = picoseconds(limit_s)
        while self.ended < len(self._requests):
            self._flush()
            due = self._kernel.run(entry.NEXT_MOMENT)
            if due >= limit or due == layout.NEVER:
                break
            if self._rebalance is None:
                self._kernel.run(entry.ADVANCE, limit, self._skip)
            else:
                self.advance(max(due / layout.PS, self.now_s + self._rebalance.interval_s))
        if limit < layout.NEVER:
            self._advance(limit)

    def observe(self) -> FleetObservation:
        """The present state of the fleet, without replicas that have ended."""
        state = self._state
        arrived = self._requests.class_index[self._reported : state.glob[layout.ARRIVED]]
        self._reported = int(state.glob[layout.ARRIVED])
        return FleetObservation(
            now_s=self.now_s,
            queued=self.queued,
            arrivals=np.bincount(arrived, minlength=self._classes).astype(np.int64),
            replicas=self.replicas(),
        )

    def replicas(self) -> tuple[ReplicaObservation, ...]:
        """The present state of the replicas that have not ended."""
        self._flush()
        self._kernel.run(entry.OBSERVE, self._state.glob[layout.NOW])
        return readout.observations(self._kernel, self._names, self._roles)

    def results(self) -> FleetResults:
        """The outcome of every request so far."""
        self._kernel.run(entry.OBSERVE, self._state.glob[layout.NOW])
        return readout.results(self._state, self._requests, self._names)

    def take_totals(self) -> tuple[ReplicaTotals, ...]:
        """The counters of all replicas, past ones included; peaks start again from now."""
        self._kernel.run(entry.OBSERVE, self._state.glob[layout.NOW])
        state = self._state
        count = len(self._names)
        found = tuple(readout.replica_totals(state, index) for index in range(count))
        for index in range(count):
            at = state.where[index]
            state.mem[at + layout.KV_PEAK] = state.mem[at + layout.KV_USED]
        return found

    def running(self, name: str) -> Ints:
        """Requests that run on a replica, in ascending order of KV."""
        rows = readout.request_rows_of(self._state)
        running = rows[:, layout.STATUS] == layout.RUNNING
        here = np.flatnonzero(running & (rows[:, layout.ON] == self._index(name)))
        ordered: Ints = here[np.argsort(rows[here, layout.COMPUTED], kind="stable")]
        return ordered

    def ended_among(self, requests: Ints) -> Ints:
        """Those of these requests that have ended, and their statuses: (2, n)."""
        rows = readout.request_rows_of(self._state)
        status = rows[requests, layout.STATUS]
        over = status >= layout.COMPLETED
        found: Ints = np.stack([requests[over], status[over]])
        return found

    def outstanding(self, name: str) -> tuple[int, int]:
        """Outstanding work of a replica, in picoseconds of expected work and in requests."""
        at = self._place(name)
        return int(self._state.mem[at + layout.OWED]), int(self._state.mem[at + layout.INFLIGHT])

    # -- internals ------------------------------------------------------------------------------
    def _advance(self, end: int) -> None:
        self._flush()
        self._kernel.run(entry.ADVANCE, end, self._skip)
        self._state.glob[layout.NOW] = max(self._state.glob[layout.NOW], end)

    def _flush(self) -> None:
        if self._dirty:
            self._dirty = False
            self._kernel.run(entry.FLUSH, self._skip)

    def _share(self, *, keep_credit: bool) -> None:
        """Set the share and credit arrays for the present replicas."""
        count = len(self._names)
        shares, credit = np.zeros((self._classes, count)), np.zeros((self._classes, count))
        for kind, row in self._shares.items():
            for index, name in enumerate(self._names):
                shares[kind, index] = row.get(name, 0.0)
        if keep_credit and count > 1:
            old = np.asarray(self._state.credit, dtype=np.float64).reshape(self._classes, -1)
            credit[:, : old.shape[1]] = old
        barred = shares < 0
        _, first, place = np.unique(barred, axis=0, return_index=True, return_inverse=True)
        groups = np.zeros(2 * self._classes, dtype=np.int64)
        if count:
            groups[: self._classes] = first[place.reshape(-1)]
        self._kernel.change(
            {"shares": shares.reshape(-1), "credit": credit.reshape(-1), "groups": groups}
        )

    def _index(self, name: str) -> int:
        """The latest replica of that name. Raises ValueError if there was none."""
        return len(self._names) - 1 - self._names[::-1].index(name)

    def _place(self, name: str) -> int:
        return int(self._state.where[self._index(name)])

    def _phase(self, name: str) -> int:
        return int(self._state.mem[self._place(name) + layout.PHASE])
