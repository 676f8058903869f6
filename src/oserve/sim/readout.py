"""Reads a fleet's state: observations of replicas, and the results of all requests."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oserve.core import ReplicaPhase, Role
from oserve.sim import entry, layout
from oserve.sim.results import FleetResults, ReplicaTotals
from oserve.sim.state import Flat, KernelState
from oserve.sim.types import Floats, Ints, ReplicaObservation, RequestTable

PHASES = {
    layout.LOADING: ReplicaPhase.LOADING,
    layout.READY: ReplicaPhase.READY,
    layout.DRAINING: ReplicaPhase.DRAINING,
    layout.GONE: ReplicaPhase.GONE,
}


def as_array(values: Flat) -> Ints:
    """A flat array of the state; a copy if the state holds lists."""
    found: Ints = np.asarray(values, dtype=np.int64)
    return found


def request_rows_of(state: KernelState) -> Ints:
    """The rows of all requests, [requests, ``layout.REQUEST``]."""
    return as_array(state.req).reshape(-1, layout.REQUEST)


def replica_totals(state: KernelState, index: int) -> ReplicaTotals:
    """Counters of one replica, as of its last step that was accounted for."""
    mem, at = state.mem, state.where[index]
    return ReplicaTotals(
        busy_s=float(mem[at + layout.BUSY] / layout.PS),
        prompt_tokens=int(mem[at + layout.PROMPTED]),
        generated_tokens=int(mem[at + layout.GENERATED]),
        preemptions=int(mem[at + layout.PREEMPTED]),
        steps=int(mem[at + layout.STEPS]),
        kv_blocks=int(mem[at + layout.BLOCKS]),
        kv_block_s=float(mem[at + layout.KV_AREA] / (2 * layout.PS // layout.US)),
        kv_peak_blocks=int(mem[at + layout.KV_PEAK]),
    )


def first_tokens(state: KernelState, replicas: int) -> Ints:
    """The number of requests with a first token, by their last replica."""
    rows = request_rows_of(state)[: state.glob[layout.ARRIVED]]
    on = rows[(rows[:, layout.FIRST] < layout.NEVER) & (rows[:, layout.ON] >= 0), layout.ON]
    counts: Ints = np.bincount(on, minlength=replicas)
    return counts


def observations(
    kernel: entry.Kernel, names: Sequence[str], roles: Sequence[Role]
) -> tuple[ReplicaObservation, ...]:
    """Replicas that have not ended; the kernel must have observed the present time."""
    state = kernel.state
    prompts = first_tokens(state, len(names))
    return tuple(
        _observation(kernel, index, name, roles[index], int(prompts[index]))
        for index, name in enumerate(names)
        if state.mem[state.where[index] + layout.PHASE] != layout.GONE
    )


def _observation(
    kernel: entry.Kernel, index: int, name: str, role: Role, prompts: int
) -> ReplicaObservation:
    state = kernel.state
    mem, at, now = state.mem, state.where[index], state.glob[layout.NOW]
    # The step in flight has allocated its blocks.
    free = kernel.run(entry.FREE_AT, index, now + 1)
    totals = replica_totals(state, index)
    return ReplicaObservation(
        name=name,
        phase=PHASES[int(mem[at + layout.PHASE])],
        role=role,
        running=int(mem[at + layout.RUN]),
        waiting=int(mem[at + layout.WAIT_COUNT]),
        inflight=int(mem[at + layout.INFLIGHT]),
        owed_s=float(mem[at + layout.OWED] / layout.PS),
        kv_usage=float(1.0 - free / mem[at + layout.BLOCKS]),
        freeness=float(kernel.run(entry.FREENESS, index, now)),
        busy_s=totals.busy_s,
        prompt_tokens=totals.prompt_tokens,
        generated_tokens=totals.generated_tokens,
        preemptions=totals.preemptions,
        steps=totals.steps,
        prompts=prompts,
    )


def results(state: KernelState, requests: RequestTable, names: Sequence[str]) -> FleetResults:
    """The results of all requests so far; the kernel must have observed the present time."""
    rows = request_rows_of(state)
    return FleetResults(
        now_s=float(state.glob[layout.NOW] / layout.PS),
        arrival_s=rows[:, layout.ARRIVAL] / layout.PS,
        dispatch_s=_seconds(rows[:, layout.SENT_AT]),
        first_token_s=_seconds(rows[:, layout.FIRST]),
        finish_s=_seconds(rows[:, layout.FINISH]),
        replica=rows[:, layout.ON].copy(),
        status=rows[:, layout.STATUS].copy(),
        preemptions=rows[:, layout.PREEMPTIONS].copy(),
        replays=rows[:, layout.REPLAYS].copy(),
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        made_tokens=rows[:, layout.MADE].copy(),
        reused_tokens=rows[:, layout.REUSED].copy(),
        class_index=requests.class_index,
        tier=requests.tier,
        tenant=requests.tenant,
        charged_s=charged_s(state),
        replica_names=tuple(names),
        totals=tuple(replica_totals(state, index) for index in range(len(names))),
    )


def charged_s(state: KernelState) -> Floats:
    """Device-seconds that fair shares have charged so far, by tenant."""
    served = np.asarray(state.levels, dtype=np.float64).reshape(-1, layout.LEVELS)[:, layout.SERVED]
    tenants = int(state.glob[layout.TENANTS])
    found: Floats = served.reshape(-1, tenants).sum(axis=0) if tenants else np.zeros(0)
    return found


def _seconds(moments: NDArray[np.int64]) -> Floats:
    found: Floats = np.where(moments == layout.NEVER, np.nan, moments / layout.PS)
    return found
