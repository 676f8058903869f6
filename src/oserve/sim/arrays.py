"""Builds the kernel's arrays: those of requests, and one replica after another."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oserve.control.dispatch.order import PRIORITY_PER_S
from oserve.core import ReplicaShape, Role
from oserve.perf.sequence_cache import SequenceCache
from oserve.sim import layout as at
from oserve.sim.steps import StepTables
from oserve.sim.types import (
    FairShares,
    Floats,
    GatewayOptions,
    Ints,
    RequestTable,
    RoutingPolicy,
    SimLink,
)

ROLES = {Role.BOTH: at.BOTH, Role.PREFILL: at.PREFILL, Role.DECODE: at.DECODE}

_ALL_TIME_S = 4e6
# A jump's closed form stays well below 2**63.
_LARGEST = 1 << 60
_LONGEST = 1 << 20
_LONGEST_CONTEXT = 1 << 24


def picoseconds(seconds: float) -> int:
    """Nearest whole picosecond; ``NEVER`` beyond the end of time."""
    return round(seconds * at.PS) if seconds < _ALL_TIME_S else at.NEVER


def fleet_arrays(
    requests: RequestTable, options: GatewayOptions, *, classes: int, closed_loop: int
) -> dict[str, Ints | Floats]:
    """All arrays of a fleet's state, without replicas, by name."""
    count = len(requests)
    glob = np.zeros(at.GLOBALS, dtype=np.int64)
    glob[at.REQUESTS] = count
    glob[at.POLICY] = RoutingPolicy.POOLS
    glob[at.OVERFLOW_PS] = picoseconds(options.overflow_s)
    glob[at.CLASSES] = classes
    glob[at.MAX_QUEUED] = options.max_queued
    glob[at.MAX_ATTEMPTS] = options.max_attempts
    glob[at.MAX_MOVES] = options.max_moves
    glob[at.LIVE_COST] = int(options.prompt_s_per_token is None)
    glob[at.SHEDS] = int(options.shed_after_s is not None)
    # Rows of requests have 0 there.
    glob[at.ROUND] = 1
    glob[at.CLOSED] = closed_loop
    glob[at.RELEASED] = min(count, closed_loop) if closed_loop > 0 else count
    sessions = int(session_numbers(requests.session).max(initial=-1)) + 1
    return {
        "req": request_rows(requests, options, closed_loop),
        "ses": session_rows(sessions),
        "glob": glob,
        "moves": np.zeros(count + 1, dtype=np.int64),
        "groups": np.zeros(2 * classes, dtype=np.int64),
        **flow_arrays(requests, options.fair, glob),
        **dict.fromkeys(("mem", "where", "inflight", "most", "fits"), np.zeros(0, dtype=np.int64)),
        **dict.fromkeys(("shares", "credit", "costs", "work", "own"), np.zeros(0)),
    }


def flow_arrays(requests: RequestTable, fair: FairShares | None, glob: Ints) -> dict[str, Any]:
    """The queues, and the arrays of fair shares; see ``layout``."""
    count, tenants, tiers = len(requests), 0, 1
    if fair is not None and requests.tenant is not None:
        tenants = len(fair.weights)
        if requests.tier is not None:
            tiers = int(requests.tier.max(initial=0)) + 1
        glob[at.TENANTS], glob[at.TIERS] = tenants, tiers
        glob[at.ACTIVE_PS] = picoseconds(fair.active_s)
    flows = max(1, tenants * tiers)
    sizes = np.bincount(flow_numbers(requests, tenants), minlength=flows)
    rows = np.zeros((flows, at.FLOW), dtype=np.int64)
    rows[1:, at.HEAP] = np.cumsum(sizes + 1)[:-1]
    holders = np.zeros((tenants, at.HOLDER), dtype=np.int64)
    holders[:, at.SEEN_AT] = -at.NEVER
    paid = np.zeros((count if tenants else 0, at.PAID))
    if tenants:
        paid[:, at.RANK] = requests.rank_s
    if tenants and requests.urgency_s is not None:
        paid[:, at.URGENCY] = requests.urgency_s
    return {
        **dict.fromkeys(("queue", "late"), np.zeros(count + flows, dtype=np.int64)),
        "flows": rows.reshape(-1),
        "levels": np.zeros(flows * at.LEVELS),
        "holders": holders.reshape(-1),
        "weights": np.array(() if fair is None else fair.weights, dtype=np.float64),
        "lasts": np.full(3 * tiers, at.NONE, dtype=np.int64),
        "paid": paid.reshape(-1),
    }


def flow_numbers(requests: RequestTable, tenants: int) -> Ints:
    """The flow of each request; 0 without ``tenants``."""
    if not tenants or requests.tenant is None:
        return np.zeros(len(requests), dtype=np.int64)
    if requests.tier is None:
        return requests.tenant
    found: Ints = requests.tier * tenants + requests.tenant
    return found


def request_rows(requests: RequestTable, gateway: GatewayOptions, closed_loop: int) -> Ints:
    """The ``req`` array."""
    count = len(requests)
    rows = np.zeros((count, at.REQUEST), dtype=np.int64)
    arrival = _ps(requests.arrival_s)
    if closed_loop > 0:
        arrival = np.zeros(count, dtype=np.int64)
    rows[:, at.ARRIVAL] = arrival
    rows[:, at.PROMPT] = requests.prompt_tokens
    rows[:, at.OUTPUT] = requests.output_tokens
    rows[:, at.EXPECTED] = requests.expected_output_tokens
    rows[:, at.CLASS] = requests.class_index
    rows[:, at.OF_SESSION] = session_numbers(requests.session)
    if gateway.fair is not None:
        rows[:, at.FLOW_OF] = flow_numbers(requests, len(gateway.fair.weights))
    rows[:, at.ORDER] = _ps(requests.rank_s)
    rows[:, at.PRIORITY] = np.trunc(requests.rank_s * PRIORITY_PER_S)
    for column in (at.DEMOTE_AT, at.SHED_AT, at.FIRST, at.FINISH, at.SENT_AT):
        rows[:, column] = at.NEVER
    if gateway.demote_after_s is not None:
        own = _ps(requests.prompt_tokens * (gateway.prompt_s_per_token or 0.0))
        rows[:, at.DEMOTE_AT] = arrival + picoseconds(gateway.demote_after_s) - own
    if requests.late_after_s is not None:
        after = requests.late_after_s
        bounded = np.where(np.isfinite(after), after, 0.0)
        rows[:, at.DEMOTE_AT] = np.where(np.isfinite(after), arrival + _ps(bounded), at.NEVER)
    if gateway.shed_after_s is not None:
        rows[:, at.SHED_AT] = arrival + picoseconds(gateway.shed_after_s)
    for column in (at.ON, at.NEXT, at.PREVIOUS, at.MOVED_FROM, at.MOVED_TO):
        rows[:, column] = at.NONE
    return rows.reshape(-1)


def session_numbers(sessions: Ints) -> Ints:
    """Sessions renumbered from 0; -1 stays."""
    own = sessions >= 0
    numbers = np.full(len(sessions), at.NONE, dtype=np.int64)
    numbers[own] = np.unique(sessions[own], return_inverse=True)[1]
    return numbers


def session_rows(count: int) -> Ints:
    """The ``ses`` array."""
    rows = np.full((max(1, count), at.SESSION), at.NONE, dtype=np.int64)
    rows[:, at.HELD_BLOCKS] = 0
    return rows.reshape(-1)


def replica_rows(
    index: int,
    shape: ReplicaShape,
    steps: StepTables,
    *,
    kv_tokens: int,
    ordered: bool,
    max_inflight: int,
    tight: tuple[int, int],
    max_prompt: int,
    ready_at: int,
    kv_bytes_per_token: float,
    link: SimLink,
    cache: SequenceCache | None = None,
) -> Ints:
    """One replica's part of the ``mem`` array, in phase loading.

    ``cache``: how sequences take it, where that is not by ``kv_tokens``.
    """
    seqs, stages = shape.max_num_seqs, shape.pipeline_parallel_size
    budget = shape.max_num_batched_tokens
    if budget < seqs:
        raise ValueError("max_num_batched_tokens must not be below max_num_seqs")
    if len(steps.prompts) <= budget or min(len(steps.joint), len(steps.decodes)) <= seqs:
        raise ValueError("the step tables are shorter than the shape's limits")
    cache = cache or SequenceCache(blocks=kv_tokens // at.BLOCK)
    blocks = cache.blocks
    if blocks < 1:
        raise ValueError("a replica needs at least one block of KV cache")
    sizes = {
        at.TABLE_PROMPTS: budget + 1,
        at.TABLE_JOINT: seqs + 1,
        at.TABLE_DECODES: seqs + 1,
        **dict.fromkeys(range(at.RUN_ID, at.RUN_CHUNK + 1), seqs),
        at.STAGE_FREE: stages,
        at.BATCH_END: stages,
        at.PHASES: cache.block_tokens,
    }
    rows = np.zeros(at.REPLICA + sum(sizes.values()), dtype=np.int64)
    position = at.REPLICA
    for field, size in sizes.items():
        rows[field] = position
        position += size
    for field, table in (
        (at.TABLE_PROMPTS, steps.prompts),
        (at.TABLE_JOINT, steps.joint),
        (at.TABLE_DECODES, steps.decodes),
    ):
        rows[rows[field] : rows[field] + sizes[field]] = table[: sizes[field]]
    # Windows alone let any number of tokens pass.
    most = cache.most_tokens or seqs * _LONGEST_CONTEXT
    heaviest = int(steps.decodes[: seqs + 1].max()) + 2 * steps.kv_rate * (most + seqs)
    values = {
        at.INDEX: index,
        at.PHASE: at.LOADING,
        at.ROLE: ROLES[shape.role],
        at.ORDERED: int(ordered),
        at.SEQS: seqs,
        at.BUDGET: budget,
        at.BLOCKS: blocks,
        at.FREE: blocks,
        at.BLOCK_TOKENS: cache.block_tokens,
        at.TABLES: cache.tables,
        at.STATE_BLOCKS: cache.state_blocks,
        at.WINDOW_TABLES: cache.window_tables,
        at.WINDOW_TOKENS: cache.window_tokens,
        at.WINDOW_BLOCK: cache.window_block_tokens,
        at.STAGES: stages,
        at.MAX_INFLIGHT: max_inflight,
        at.MAX_PROMPT: max_prompt,
        at.DEVICES: shape.device_count,
        at.TIGHT_INFLIGHT: tight[0],
        at.TIGHT_PROMPTING: tight[1],
        at.KV_RATE: steps.kv_rate,
        at.PAIR_RATE: steps.pair_rate,
        at.LONGEST_JUMP: max(1, min(_LONGEST, _LARGEST // max(1, heaviest))),
        at.LINK_PS: picoseconds(link.latency_s),
        at.LINK_PS_PER_TOKEN: round(kv_bytes_per_token / link.bytes_per_s * at.PS),
        at.READY_AT: ready_at,
        at.DUE: ready_at,
        **dict.fromkeys((at.END, at.BEGIN), at.NEVER),
        **dict.fromkeys((at.WAIT, at.WAIT_TAIL, at.RECENT, at.RECENT_TAIL), at.NONE),
    }
    for field, value in values.items():
        rows[field] = value
    return rows


def _ps(seconds: NDArray[Any]) -> Ints:
    whole: Ints = np.round(np.minimum(seconds, _ALL_TIME_S) * at.PS).astype(np.int64)
    return whole
