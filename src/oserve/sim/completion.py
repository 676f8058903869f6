"""The end of a step: tokens, completions and migrations; and the ledger of outstanding work.

As in the live ledger, a replica owes the expected work of its requests. The first token pays for
the prompt, and the end of the request pays for the rest. The live ledger also learns the speed of
each replica; here the costs are exact.
"""

from oserve.sim.access import add_to_entry, column, entry, set_entry
from oserve.sim.blocks import blocks_of, mark, reserved, retain, weigh, whole_of
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    ARRIVAL,
    BATCH,
    BATCH_END,
    BATCHES,
    BLOCKS,
    BOOKED,
    BOOKED_PROMPT,
    CLOSED,
    COMPLETED,
    COMPUTED,
    COPIED,
    DECODE,
    DEMOTE_AT,
    END,
    ENDED,
    EXPECTED,
    FAST,
    FINISH,
    FIRST,
    FREE,
    FREED,
    GENERATED,
    GONE,
    INDEX,
    INFLIGHT,
    JUMP,
    LEAVING,
    LINK_FREE,
    LINK_PS,
    LINK_PS_PER_TOKEN,
    MADE,
    MOVED_AT,
    MOVED_FROM,
    MOVED_TO,
    MOVING,
    NEVER,
    NEW,
    NEXT_END,
    NONE,
    OF_SESSION,
    ON,
    ORDERED,
    OUTPUT,
    OWED,
    OWED_PROMPT,
    PHASE,
    PREFILL,
    PS,
    READY,
    RELEASED,
    REPLICAS,
    REQUEST,
    REQUESTS,
    ROLE,
    RUN,
    RUN_BATCH,
    RUN_GOAL,
    RUN_ID,
    RUN_LEFT,
    RUN_STATE,
    STAGES,
    STATUS,
    STEADY,
    STEADY_RUN,
    TICK,
    WAIT,
    WAIT_COUNT,
    WAITING,
)
from oserve.sim.lists import insert_before, insert_ordered, pop, push
from oserve.sim.lockstep import arrived, cut, done_of, find_next_end, join, left_of, part, settle
from oserve.sim.schedule import move_slot, refresh, touch
from oserve.sim.shares import begins, correct_charge
from oserve.sim.state import Flat, KernelState


@compiled
def book(req: Flat, mem: Flat, at: int, request: int, prompt: int, whole: int) -> None:
    """Book ``whole`` picoseconds of work at a replica, ``prompt`` of them for the prompt."""
    base = request * REQUEST
    req[base + BOOKED] = whole
    req[base + BOOKED_PROMPT] = prompt
    req[base + ON] = mem[at + INDEX]
    mem[at + OWED] += whole
    mem[at + OWED_PROMPT] += prompt
    mem[at + INFLIGHT] += 1


@compiled
def unbook(req: Flat, mem: Flat, glob: Flat, at: int, request: int) -> None:
    """Free a request's slot at its replica, which may then have room for another."""
    glob[FREED] = 1
    mem[at + OWED] -= req[request * REQUEST + BOOKED]
    mem[at + OWED_PROMPT] -= req[request * REQUEST + BOOKED_PROMPT]
    mem[at + INFLIGHT] -= 1


@compiled
def close(s: KernelState, request: int, status: int, now: int) -> None:
    """End a request with a status; a closed loop then admits the next one."""
    req, glob = s.req, s.glob
    req[request * REQUEST + STATUS] = status
    req[request * REQUEST + FINISH] = now
    glob[ENDED] += 1
    if glob[CLOSED] > 0 and glob[RELEASED] < glob[REQUESTS]:
        base = glob[RELEASED] * REQUEST
        req[base + ARRIVAL] = now
        req[base + DEMOTE_AT] = min(NEVER, req[base + DEMOTE_AT] + now)
        glob[RELEASED] += 1


@compiled
def wait_at(req: Flat, mem: Flat, at: int, request: int, now: int) -> None:
    """Add a request to the queue of an engine."""
    req[request * REQUEST + STATUS] = WAITING
    if mem[at + ORDERED] == 0:
        insert_before(req, mem, at + WAIT, request, NONE)
    else:
        insert_ordered(req, mem, at + WAIT, request)
    arrived(mem, at, now, request)
    touch(mem, at, now)


@compiled
def decode_target(s: KernelState, request: int, source: int) -> int:
    """The decode replica that would finish a request first, or ``NONE``."""
    req, mem = s.req, s.mem
    best, best_work = NONE, 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if index == source or mem[at + PHASE] != READY or mem[at + ROLE] != DECODE:
            continue
        if whole_of(req, mem, at, request) > mem[at + BLOCKS]:
            continue
        work = mem[at + OWED] + decode_ps(s, request, index)
        if best == NONE or work < best_work:
            best, best_work = index, work
    return best


@compiled
def decode_ps(s: KernelState, request: int, index: int) -> int:
    """Expected work of the rest of a request's output at a replica."""
    left = max(1, s.req[request * REQUEST + EXPECTED] - s.req[request * REQUEST + MADE])
    return int(left * s.costs[2 * index + 1] * PS + 0.5)


@compiled
def depart(s: KernelState, at: int, slot: int, target: int, now: int) -> None:
    """Send a running sequence to another replica; a link runs one transfer at a time.

    A live migration does not copy KV again that it has copied before.
    """
    req, mem = s.req, s.mem
    request = entry(mem, at, RUN_ID, slot)
    base = request * REQUEST
    done = done_of(mem, at, slot)
    req[base + COMPUTED] = done
    begin = max(now, mem[at + LINK_FREE])
    mem[at + LINK_FREE] = begin + (done - req[base + COPIED]) * mem[at + LINK_PS_PER_TOKEN]
    req[base + COPIED] = 0
    req[base + MOVED_AT] = mem[at + LINK_FREE] + mem[at + LINK_PS]
    req[base + MOVED_FROM] = mem[at + INDEX]
    req[base + MOVED_TO] = target
    req[base + STATUS] = MOVING
    unbook(req, mem, s.glob, at, request)
    book(req, mem, s.where[target], request, 0, decode_ps(s, request, target))
    push(req, s.moves, 0, MOVED_AT, request)


@compiled
def receive(s: KernelState, now: int) -> int:
    """Complete a transfer; returns the request if its source or target has ended, else ``NONE``."""
    req, mem = s.req, s.mem
    request = pop(req, s.moves, 0, MOVED_AT)
    base = request * REQUEST
    if req[base + MOVED_FROM] != NONE:
        source = s.where[req[base + MOVED_FROM]]
        weigh(mem, source, now)
        mem[source + FREE] += blocks_of(mem, source, req[base + COMPUTED])
        mem[source + FREE] += reserved(req, mem, source, request)
        mark(mem, source)
        if mem[source + WAIT_COUNT] > 0:
            cut(mem, source, now)
        touch(mem, source, now)
    target = s.where[req[base + MOVED_TO]]
    # Its source was lost during the transfer, or its target.
    if req[base + MOVED_FROM] == NONE or mem[target + PHASE] == GONE:
        unbook(req, mem, s.glob, target, request)
        return request
    wait_at(req, mem, target, request, now)
    return NONE


@compiled
def emit_first(s: KernelState, at: int, slot: int, now: int) -> None:
    """Emit the first token of a sequence on this replica."""
    req, mem = s.req, s.mem
    base = entry(mem, at, RUN_ID, slot) * REQUEST
    if req[base + FIRST] == NEVER:
        req[base + FIRST] = now
    s.glob[FREED] = 1
    begins(s, entry(mem, at, RUN_ID, slot))
    mem[at + OWED] -= req[base + BOOKED_PROMPT]
    mem[at + OWED_PROMPT] -= req[base + BOOKED_PROMPT]
    req[base + BOOKED] -= req[base + BOOKED_PROMPT]
    req[base + BOOKED_PROMPT] = 0
    set_entry(mem, at, RUN_STATE, slot, STEADY)


@compiled
def leaves(s: KernelState, at: int, slot: int, now: int) -> bool:
    """Whether a sequence that just emitted a token completes or migrates."""
    req, mem = s.req, s.mem
    request = entry(mem, at, RUN_ID, slot)
    base = request * REQUEST
    left, state = left_of(mem, at, slot), entry(mem, at, RUN_STATE, slot)
    req[base + MADE] = req[base + OUTPUT] - left
    if state == NEW:
        emit_first(s, at, slot, now)
    if left == 0:
        mem[at + FREE] += reserved(req, mem, at, request)
        retain(mem, s.ses, s.where, at, req[base + OF_SESSION], done_of(mem, at, slot))
        unbook(req, mem, s.glob, at, request)
        correct_charge(s, request)
        close(s, request, COMPLETED, now)
        return True
    target = NONE
    if state == NEW and mem[at + ROLE] == PREFILL:
        target = decode_target(s, request, mem[at + INDEX])
    elif state == LEAVING and now >= req[base + MOVED_AT]:
        target = req[base + MOVED_TO]
        if mem[s.where[target] + PHASE] != READY:
            set_entry(mem, at, RUN_STATE, slot, STEADY)
            req[base + COPIED] = 0
            target = NONE
    if target == NONE:
        return False
    depart(s, at, slot, target, now)
    return True


@compiled
def sweep(s: KernelState, at: int, batch: int, now: int) -> None:
    """Remove the sequences of this step that complete or migrate."""
    mem = s.mem
    batches, left = column(mem, at, RUN_BATCH), column(mem, at, RUN_LEFT)
    states = column(mem, at, RUN_STATE)
    kept = 0
    for slot in range(mem[at + RUN]):
        if mem[batches + slot] == batch:
            mem[batches + slot] = NONE
            if (mem[left + slot] == 0 or mem[states + slot] != STEADY) and leaves(s, at, slot, now):
                continue
        if kept != slot:
            move_slot(mem, at, slot, kept)
        kept += 1
    mem[at + RUN] = kept


@compiled
def end_together(s: KernelState, at: int, now: int) -> None:
    """End steps in lockstep: steady sequences complete, prompts emit first tokens."""
    mem = s.mem
    settle(mem, s.ses, at, mem[at + JUMP])
    weigh(mem, at, now)
    mem[at + FAST] = 0
    first = kept = mem[at + STEADY_RUN]
    if mem[at + NEXT_END] == mem[at + TICK]:
        left = column(mem, at, RUN_LEFT)
        kept = 0
        for slot in range(first):
            if mem[left + slot] == mem[at + TICK]:
                leaves(s, at, slot, now)
                part(mem, at, slot)
            else:
                if kept != slot:
                    move_slot(mem, at, slot, kept)
                kept += 1
    if kept < first:
        mem[at + STEADY_RUN] = kept
        find_next_end(mem, at)
    for slot in range(first, mem[at + RUN]):
        if kept != slot:
            move_slot(mem, at, slot, kept)
        if entry(mem, at, RUN_BATCH, kept) != NONE:
            set_entry(mem, at, RUN_BATCH, kept, NONE)
            add_to_entry(mem, at, RUN_LEFT, kept, -1)
            mem[at + GENERATED] += 1
            if leaves(s, at, kept, now):
                continue
            join(mem, at, kept)
        kept += 1
    mem[at + RUN] = kept


@compiled
def emit(mem: Flat, at: int, batch: int) -> None:
    """Emit a token for every sequence whose last known token was in this step."""
    batches, goal = column(mem, at, RUN_BATCH), column(mem, at, RUN_GOAL)
    left = column(mem, at, RUN_LEFT)
    emitted = 0
    for slot in range(mem[at + RUN]):
        if mem[batches + slot] == batch:
            mem[goal + slot] += 1
            mem[left + slot] -= 1
            emitted += 1
    mem[at + GENERATED] += emitted


@compiled
def end_step(s: KernelState, at: int, now: int) -> None:
    """End the oldest step in flight, or the jump."""
    mem = s.mem
    if mem[at + JUMP] > 0:
        end_together(s, at, now)
    else:
        weigh(mem, at, now)
        emit(mem, at, mem[at + BATCH])
        sweep(s, at, mem[at + BATCH], now)
    mark(mem, at)
    mem[at + BATCHES] -= 1
    mem[at + BATCH] = (mem[at + BATCH] + 1) % mem[at + STAGES]
    mem[at + END] = NEVER
    if mem[at + BATCHES] > 0:
        mem[at + END] = entry(mem, at, BATCH_END, mem[at + BATCH])
    touch(mem, at, now)
    refresh(mem, at)
