"""Inputs and outputs of a fleet: requests, options, observations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.order import OrderPolicy, rank_s
from oserve.core import ReplicaPhase, Role
from oserve.sim import layout
from oserve.traces import TraceRequest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Anything that numpy makes an array of.
Numbers = Sequence[float] | Sequence[int] | NDArray[Any]


class RoutingPolicy(IntEnum):
    """How the gateway chooses a replica.

    POOLS is the live router's choice. LEAST_REQUESTS joins the shortest queue; FIXED_SHARES is
    weighted round robin, blind to load; FREENESS is Llumnix's dispatch.
    """

    POOLS = layout.POOLS
    LEAST_WORK = layout.LEAST_WORK
    LEAST_REQUESTS = layout.LEAST_REQUESTS
    ROUND_ROBIN = layout.ROUND_ROBIN
    FIXED_SHARES = layout.FIXED_SHARES
    FREENESS = layout.FREENESS


class Status(IntEnum):
    """Status of a request.

    REFUSED: the gateway's queue was full, or no replica could ever hold it. SHED: it waited longer
    than allowed. LOST: its replica failed, and no other could take it.
    """

    PENDING = layout.PENDING
    QUEUED = layout.QUEUED
    WAITING = layout.WAITING
    RUNNING = layout.RUNNING
    MOVING = layout.MOVING
    COMPLETED = layout.COMPLETED
    REFUSED = layout.REFUSED
    SHED = layout.SHED
    LOST = layout.LOST


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """Requests in order of arrival, an entry each; lengths are in tokens, at least 1.

    ``output_tokens`` are the true lengths, which only engines see; the router assumes
    ``expected_output_tokens``. ``class_index`` is the routing class. The lower ``rank_s`` goes
    first where requests are ordered. ``session`` is -1 for requests without one; the prompt of a
    session's request begins with all tokens of the request before it. ``tier``: an index, for the
    results. ``late_after_s``: the own ``demote_after_s`` of each request, infinite for none.
    ``tenant``: an index into ``FairShares.weights``. ``urgency_s``: what a tier adds to the rank
    that fair shares give a request in an engine.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    expected_output_tokens: Ints
    class_index: Ints
    rank_s: Floats
    session: Ints
    tier: Ints | None = None
    late_after_s: Floats | None = None
    tenant: Ints | None = None
    urgency_s: Floats | None = None

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        for values in (self.prompt_tokens, self.output_tokens, self.expected_output_tokens):
            if len(values) != count or (count and int(values.min()) < 1):
                raise ValueError("every request needs lengths of at least 1 token")
        if any(len(v) != count for v in (self.class_index, self.rank_s, self.session)):
            raise ValueError("all columns need an entry for each request")
        if count and (float(self.arrival_s[0]) < 0 or bool((np.diff(self.arrival_s) < 0).any())):
            raise ValueError("arrivals must ascend from 0 s")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def of(
        cls,
        arrival_s: Numbers,
        prompt_tokens: Numbers,
        output_tokens: Numbers,
        *,
        expected_output_tokens: Numbers | None = None,
        class_index: Numbers | None = None,
        rank_s: Numbers | None = None,
        session: Numbers | None = None,
        tier: Ints | None = None,
        late_after_s: Floats | None = None,
        tenant: Ints | None = None,
        urgency_s: Floats | None = None,
    ) -> Self:
        """Defaults: the mean as expected output, one class, in order of arrival, no session."""
        arrival = np.asarray(arrival_s, dtype=np.float64)
        output = np.asarray(output_tokens, dtype=np.int64)
        mean = max(1, round(float(output.mean()))) if len(output) else 1

        def whole(values: Numbers | None, other: int) -> Ints:
            if values is None:
                return np.full(len(arrival), other, dtype=np.int64)
            return np.asarray(values, dtype=np.int64)

        return cls(
            arrival_s=arrival,
            prompt_tokens=np.asarray(prompt_tokens, dtype=np.int64),
            output_tokens=output,
            expected_output_tokens=whole(expected_output_tokens, mean),
            class_index=whole(class_index, 0),
            rank_s=arrival if rank_s is None else np.asarray(rank_s, dtype=np.float64),
            session=whole(session, -1),
            tier=tier,
            late_after_s=late_after_s,
            tenant=tenant,
            urgency_s=urgency_s,
        )

    @classmethod
    def from_trace(
        cls,
        requests: Sequence[TraceRequest],
        *,
        order: OrderPolicy | None = None,
        expected_output_tokens: Numbers | None = None,
        class_index: Numbers | None = None,
    ) -> Self:
        """The requests of a trace; ``order`` ranks them as the live gateway does."""
        names: dict[str, int] = {}
        sessions = [names.setdefault(r.session, len(names)) if r.session else -1 for r in requests]
        ranks = None
        if order is not None:
            ranks = [
                rank_s(order, arrival_s=r.arrival_s, prompt_tokens=r.prompt_tokens)
                for r in requests
            ]
        return cls.of(
            [r.arrival_s for r in requests],
            [r.prompt_tokens for r in requests],
            [r.output_tokens for r in requests],
            expected_output_tokens=expected_output_tokens,
            class_index=class_index,
            rank_s=ranks,
            session=sessions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FairShares:
    """Fair shares between tenants, with a weight each; see ``control.dispatch.FairPolicy``."""

    weights: tuple[float, ...]
    reserve: float = FairPolicy().reserve
    active_s: float = FairPolicy().active_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """The gateway before the replicas; see ``control.dispatch``.

    At most ``max_queued`` requests wait. ``overflow_s``: see the router. A waiting request is
    demoted after ``arrival + demote_after_s - prompt tokens * prompt_s_per_token``: it is served
    after all others, in order of arrival. ``prompt_s_per_token`` of ``None`` takes the least cost
    of the replicas that serve at that time. A request that still waits ``shed_after_s`` after its
    arrival is shed. ``None`` disables either. A request is sent to at most ``max_attempts``
    replicas before its first token, and its stream migrates at most ``max_moves`` times. ``fair``:
    ``None`` serves all tenants as one.
    """

    max_queued: int = 1_000_000
    overflow_s: float = 2.0
    demote_after_s: float | None = None
    shed_after_s: float | None = None
    prompt_s_per_token: float | None = 0.0
    max_attempts: int = 1_000_000
    max_moves: int = 1_000_000
    fair: FairShares | None = None

    def __post_init__(self) -> None:
        late, lost = self.demote_after_s, self.shed_after_s
        if late is not None and lost is not None and lost < late:
            raise ValueError("shed_after_s must not come before demote_after_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimLink:
    """A replica's link for KV transfers, one at a time."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """Llumnix's rebalancing: every ``interval_s`` running requests move to freer replicas.

    Requests move from replicas with fewer than ``source_below`` free blocks per running sequence
    (less the blocks that the queue needs) to replicas with more than ``target_above``: from the
    fullest to the freest, at most ``moves`` per pair, in ascending order of KV.
    """

    interval_s: float = 1.0
    source_below: float = 4.0
    target_above: float = 16.0
    moves: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaObservation:
    """One replica at one time; counters begin at its start.

    ``inflight`` counts requests dispatched to it and not ended, ``owed_s`` the engine seconds
    expected for them. ``kv_usage`` is the used fraction of the KV cache. ``prompts``: requests that
    had their first token there.
    """

    name: str
    phase: ReplicaPhase
    role: Role
    running: int
    waiting: int
    inflight: int
    owed_s: float
    kv_usage: float
    freeness: float
    busy_s: float
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    prompts: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetObservation:
    """A fleet at one time. ``arrivals``: by class since the last observation."""

    now_s: float
    queued: int
    arrivals: Ints
    replicas: tuple[ReplicaObservation, ...]
