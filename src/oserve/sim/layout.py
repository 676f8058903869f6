"""The memory layout of the kernel: positions in flat arrays of 64-bit integers, and codes.

All times and all work are whole picoseconds, so that a sum in closed form equals the sum step by
step to the last bit.

    req     REQUEST fields for each request
    mem     for each replica REPLICA fields, then its step tables, running sequences and stages;
            ``where[replica]`` is the position of the first, called ``at`` throughout
    ses     SESSION fields for each session
    glob    the fleet's own numbers
    queue, late, moves    heaps of requests, their length first; a queue for each flow, from HEAP on
    flows, levels         FLOW whole numbers and LEVELS others for each flow
    holders, weights      HOLDER whole numbers and the weight of each tenant
    paid                  PAID numbers for each request: what its tenant was charged

A flow is what one tenant asks for in one tier: ``tier * tenants + tenant``. Without tenants there
is one flow.
"""

from typing import Final

NEVER: Final = 1 << 62
NONE: Final = -1

PS: Final = 10**12
# A query-key pair of a prompt is so cheap that its rate is in 1/1024 ps.
PAIR_BITS: Final = 10
# Tokens in one block of KV cache of a plain model, and the unit in which requests are compared.
BLOCK: Final = 16
# The use of KV cache is added up in microseconds: in picoseconds an hour would not fit.
US: Final = 10**6

# Statuses of a request.
(PENDING, QUEUED, WAITING, RUNNING, MOVING, COMPLETED, REFUSED, SHED, LOST) = range(9)

# Phases of a replica.
(LOADING, READY, DRAINING, GONE) = range(4)

# Roles of a replica.
(BOTH, PREFILL, DECODE) = range(3)

# Routing policies.
(POOLS, LEAST_WORK, LEAST_REQUESTS, ROUND_ROBIN, FIXED_SHARES, FREENESS) = range(6)

# Fields of a request. PRIORITY orders it in engines, ORDER in the gateway's queue. COMPUTED and
# MADE (tokens with KV, tokens emitted) are current only while it does not run. BOOKED is its
# outstanding work at its replica, BOOKED_PROMPT the part that its first token pays. REPLAYS counts
# the losses of its replica, MOVES those after its first token. ENTERED is the round in which it
# entered the queue again. SENT_AT is the time of its last dispatch. CHARGED: its tenant was charged
# for its present replica, where it came with CHARGED_MADE output tokens; BEGUN: and it has had its
# first token from there.
(
    ARRIVAL,
    PROMPT,
    OUTPUT,
    PRIORITY,
    ORDER,
    CLASS,
    EXPECTED,
    OF_SESSION,
    DEMOTE_AT,
    SHED_AT,
    STATUS,
    ON,
    NEXT,
    PREVIOUS,
    COMPUTED,
    MADE,
    FIRST,
    FINISH,
    PREEMPTIONS,
    REPLAYS,
    BOOKED,
    BOOKED_PROMPT,
    IS_LATE,
    MOVED_AT,
    MOVED_FROM,
    MOVED_TO,
    COPIED,
    REUSED,
    MOVES,
    ENTERED,
    SENT_AT,
    FLOW_OF,
    CHARGED,
    CHARGED_MADE,
    BEGUN,
) = range(35)
REQUEST: Final = 35

# Fields of a replica. Lists take three: head, tail, count. TABLE_..., RUN_... (of the running
# sequences: RUN of them, in order of admission), STAGE_FREE, BATCH_END and PHASES are positions
# relative to the replica's own. LOCKED to FAST: see ``lockstep``. KV_AT to WINDOW_BLOCK: see
# ``blocks``.
# TIGHT_INFLIGHT: the most in flight where a request leaves slots free for other tenants;
# TIGHT_PROMPTING: the same while the replica owes prompts.
(
    INDEX,
    PHASE,
    ROLE,
    ORDERED,
    SEQS,
    BUDGET,
    BLOCKS,
    STAGES,
    MAX_INFLIGHT,
    MAX_PROMPT,
    KV_RATE,
    PAIR_RATE,
    LONGEST_JUMP,
    LINK_PS,
    LINK_PS_PER_TOKEN,
    LINK_FREE,
    READY_AT,
    TABLE_PROMPTS,
    TABLE_JOINT,
    TABLE_DECODES,
    RUN_ID,
    RUN_DONE,
    RUN_GOAL,
    RUN_LEFT,
    RUN_BATCH,
    RUN_STATE,
    RUN_CHUNK,
    STAGE_FREE,
    BATCH_END,
    PHASES,
    DUE,
    END,
    BEGIN,
    RUN,
    WAIT,
    WAIT_TAIL,
    WAIT_COUNT,
    FREE,
    REUSABLE,
    RECENT,
    RECENT_TAIL,
    RECENT_COUNT,
    BATCH,
    BATCHES,
    JUMP,
    JUMP_START,
    LOCKED,
    STEADY_RUN,
    TICK,
    CONTEXT,
    NEXT_END,
    FAST,
    INFLIGHT,
    OWED,
    OWED_PROMPT,
    BUSY,
    PROMPTED,
    GENERATED,
    PREEMPTED,
    STEPS,
    KV_AT,
    KV_USED,
    KV_AREA,
    KV_PEAK,
    DEVICES,
    TIGHT_INFLIGHT,
    TIGHT_PROMPTING,
    BLOCK_TOKENS,
    TABLES,
    STATE_BLOCKS,
    WINDOW_TABLES,
    WINDOW_TOKENS,
    WINDOW_BLOCK,
) = range(73)
REPLICA: Final = 73

# States of a running sequence: before its first token here; decoding; decoding until it migrates.
(NEW, STEADY, LEAVING) = range(3)

# Fields of a session: the replica that holds its last turn, and how many blocks of it.
HELD_BY, HELD_BLOCKS, SESSION_NEXT, SESSION_PREVIOUS = range(4)
SESSION: Final = 4

# The fleet's own numbers. RELEASED: requests that a closed loop has admitted. FREED: a replica may
# have room for a waiting request. ROUND counts dispatches by rank, REENTERED the requests that have
# entered the queue again in this one. No request before SHED_CURSOR may be shed. WAITS: how many
# requests wait. TENANTS: 0 without tenants. ACTIVE: tenants that asked in the last ACTIVE_PS. WAKES
# counts how often a flow began to wait, WAKES_BEFORE those before this round, FRESH those whose
# counters are not lifted yet.
(
    NOW,
    ARRIVED,
    REQUESTS,
    REPLICAS,
    POLICY,
    OVERFLOW_PS,
    TURN,
    CLASSES,
    MAX_QUEUED,
    CLOSED,
    RELEASED,
    ENDED,
    MAX_ATTEMPTS,
    MAX_MOVES,
    LIVE_COST,
    SHEDS,
    SHED_CURSOR,
    FREED,
    ROUND,
    REENTERED,
    WAITS,
    TENANTS,
    TIERS,
    ACTIVE,
    ACTIVE_PS,
    WAKES,
    WAKES_BEFORE,
    FRESH,
) = range(28)
GLOBALS: Final = 28

# Fields of a flow: the position of its queues, the number of its waiting requests, when it last
# began to wait, whether that was in this round, and the rounds that pass over the rest of it, for
# requests that are not late and that are.
HEAP, FLOW_WAITS, WOKEN, IS_FRESH, SKIPPED = range(5)
FLOW: Final = 6
# LEVEL, TAG and UNBEGUN: see ``control.dispatch.fair``. SERVED: device-seconds charged.
LEVEL, SERVED, TAG, UNBEGUN = range(4)
LEVELS: Final = 4

# Fields of a tenant: requests with open charges, and its last arrival.
OPEN, SEEN_AT = range(2)
HOLDER: Final = 2

# Of a request's charge: device-seconds of the prompt and of an output token, and what was charged.
# URGENCY is what its tier adds to its rank in an engine, in seconds; RANK the one without shares.
PAID_PROMPT, PAID_TOKEN, PAID_WHOLE, URGENCY, RANK = range(5)
PAID: Final = 5
