"""Lockstep decoding: steps in which all sequences decode, counted together.

While it preempts none, an engine without pipeline stages gives each decoding sequence one token in
every step. So it is enough to count steps (TICK): for the first STEADY_RUN running sequences
RUN_DONE holds the tokens done minus the tick, RUN_LEFT the tick of the last token. Totals over them
are CONTEXT (tokens attended to in the next step), NEXT_END, and PHASES (how many need a new block
at each tick modulo the tokens of a block). The sequences after them (a partial prompt, and those
just admitted) have entries of their own. That is LOCKED; otherwise every sequence has its own.

A step that contains prompts is FAST. Without prompts many steps are taken at once in closed form:
with d sequences and c tokens step j (from 1) takes decodes[d] + kv_rate (c + d (j - 1)), so the
first j take j (decodes[d] + kv_rate c) + kv_rate d j (j - 1) / 2. Such a JUMP lasts until a
sequence ends or blocks run out. An earlier event cuts it at the end of a step.
"""

from oserve.sim.access import add_to_entry, column, entry, set_entry
from oserve.sim.blocks import blocks_of, mark, take, weigh
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BATCH,
    BATCH_END,
    BATCHES,
    BEGIN,
    BLOCK_TOKENS,
    BUDGET,
    BUSY,
    CONTEXT,
    END,
    FAST,
    FREE,
    GENERATED,
    JUMP,
    JUMP_START,
    KV_RATE,
    LOCKED,
    LONGEST_JUMP,
    NEVER,
    NEW,
    NEXT_END,
    NONE,
    PHASES,
    REUSABLE,
    RUN,
    RUN_BATCH,
    RUN_CHUNK,
    RUN_DONE,
    RUN_GOAL,
    RUN_LEFT,
    RUN_STATE,
    SEQS,
    STAGE_FREE,
    STAGES,
    STEADY,
    STEADY_RUN,
    STEPS,
    TABLE_DECODES,
    TABLES,
    TICK,
    WAIT,
)
from oserve.sim.schedule import admissible, admit_waiting, cost, refresh, schedule, send_through
from oserve.sim.state import Flat


@compiled
def find_next_end(mem: Flat, at: int) -> None:
    """The tick at which the first of the steady sequences ends."""
    left = column(mem, at, RUN_LEFT)
    soonest = NEVER
    for slot in range(mem[at + STEADY_RUN]):
        soonest = min(soonest, mem[left + slot])
    mem[at + NEXT_END] = soonest


@compiled
def lock(mem: Flat, at: int) -> bool:
    """Begin to count in lockstep, if all running sequences but the last decode."""
    seqs = mem[at + RUN]
    states, done = column(mem, at, RUN_STATE), column(mem, at, RUN_DONE)
    if seqs > 0 and mem[states + seqs - 1] == NEW:
        seqs -= 1
    for slot in range(seqs):
        if mem[states + slot] != STEADY:
            return False
    phases = column(mem, at, PHASES)
    size = mem[at + BLOCK_TOKENS]
    for phase in range(size):
        mem[phases + phase] = 0
    context = seqs
    for slot in range(seqs):
        context += mem[done + slot]
        mem[phases + (-mem[done + slot]) % size] += 1
    mem[at + LOCKED] = 1
    mem[at + STEADY_RUN] = seqs
    mem[at + CONTEXT] = context
    mem[at + TICK] = 0
    find_next_end(mem, at)
    return True


@compiled
def unlock(mem: Flat, ses: Flat, at: int) -> None:
    """Give every sequence its own entries again, and the step in flight as well.

    The caller has cut a jump to that step.
    """
    if mem[at + LOCKED] == 0:
        return
    tick, on_its_way = mem[at + TICK], mem[at + JUMP]
    done, goal = column(mem, at, RUN_DONE), column(mem, at, RUN_GOAL)
    left, batches = column(mem, at, RUN_LEFT), column(mem, at, RUN_BATCH)
    if on_its_way == 1 and mem[at + FAST] == 0:
        take(mem, ses, at, blocks_in(mem, at, 1))
        mem[at + BUSY] += jump_ps(mem, at, 1)
        mem[at + STEPS] += 1
    for slot in range(mem[at + STEADY_RUN]):
        mem[done + slot] += tick + on_its_way
        mem[goal + slot] = mem[done + slot] + 1 - on_its_way
        mem[left + slot] -= tick
        mem[batches + slot] = mem[at + BATCH] if on_its_way == 1 else NONE
    mem[at + LOCKED] = mem[at + JUMP] = mem[at + FAST] = 0


@compiled
def join(mem: Flat, at: int, slot: int) -> None:
    """Add a sequence that has emitted a token to the steady ones, from its slot or later."""
    place, tick = mem[at + STEADY_RUN], mem[at + TICK]
    done = entry(mem, at, RUN_DONE, slot)
    set_entry(mem, at, RUN_DONE, slot, done - tick)
    add_to_entry(mem, at, RUN_LEFT, slot, tick)
    add_to_entry(mem, at, PHASES, (tick - done) % mem[at + BLOCK_TOKENS], 1)
    mem[at + CONTEXT] += done + 1
    mem[at + NEXT_END] = min(mem[at + NEXT_END], entry(mem, at, RUN_LEFT, slot))
    mem[at + STEADY_RUN] = place + 1


@compiled
def part(mem: Flat, at: int, slot: int) -> None:
    """Remove a steady sequence from the totals."""
    base = entry(mem, at, RUN_DONE, slot)
    add_to_entry(mem, at, PHASES, (-base) % mem[at + BLOCK_TOKENS], -1)
    mem[at + CONTEXT] -= base + mem[at + TICK] + 1


@compiled
def blocks_in(mem: Flat, at: int, steps: int) -> int:
    """Blocks that the steady sequences allocate in their next ``steps``."""
    phases, tick = column(mem, at, PHASES), mem[at + TICK]
    size = mem[at + BLOCK_TOKENS]
    times = mem[at + STEADY_RUN] * (steps // size)
    for step in range(steps % size):
        times += mem[phases + (tick + step) % size]
    return times * mem[at + TABLES]


@compiled
def steps_with_room(mem: Flat, at: int, most: int) -> int:
    """Steps, at most ``most``, for which the free blocks suffice."""
    seqs, size = mem[at + STEADY_RUN], mem[at + BLOCK_TOKENS]
    if mem[at + TABLES] == 0:
        return most
    # Times that a sequence can allocate, which each does every so many steps.
    room = (mem[at + FREE] + mem[at + REUSABLE]) // mem[at + TABLES]
    if seqs * ((most + size - 1) // size) <= room:
        return most
    phases, tick = column(mem, at, PHASES), mem[at + TICK]
    steps = room // seqs * size
    room -= room // seqs * seqs
    for step in range(size):
        room -= mem[phases + (tick + step) % size]
        if room < 0:
            break
        steps += 1
    return min(most, steps)


@compiled
def jump_ps(mem: Flat, at: int, steps: int) -> int:
    """Picoseconds of the next ``steps`` of decoding alone."""
    rate, seqs = mem[at + KV_RATE], mem[at + STEADY_RUN]
    first = entry(mem, at, TABLE_DECODES, seqs) + rate * mem[at + CONTEXT]
    return steps * first + rate * seqs * (steps * (steps - 1) // 2)


@compiled
def begin_jump(req: Flat, mem: Flat, at: int, now: int) -> bool:
    """Begin as many steps of decoding alone as are certain; False if there are none.

    If there is no room for the head of the queue now, there is none until a sequence ends, since
    free blocks only decrease.
    """
    seqs = mem[at + STEADY_RUN]
    if seqs == 0 or seqs < mem[at + RUN] or admissible(req, mem, at):
        return False
    most = min(mem[at + NEXT_END] - mem[at + TICK], mem[at + LONGEST_JUMP])
    steps = steps_with_room(mem, at, most)
    if steps == 0:
        return False
    mem[at + JUMP] = steps
    mem[at + JUMP_START] = now
    mem[at + BATCHES] = 1
    mem[at + BEGIN] = NEVER
    set_end(mem, at)
    return True


@compiled
def begin_fast(req: Flat, mem: Flat, ses: Flat, at: int, now: int) -> bool:
    """Begin one step that contains prompts; False if it requires preemption."""
    seqs = mem[at + STEADY_RUN]
    budget = mem[at + BUDGET] - seqs
    blocks = blocks_in(mem, at, 1)
    if mem[at + RUN] > seqs:
        have = entry(mem, at, RUN_DONE, seqs)
        chunk = min(entry(mem, at, RUN_GOAL, seqs) - have, budget)
        blocks += blocks_of(mem, at, have + chunk) - blocks_of(mem, at, have)
    if blocks > mem[at + FREE] + mem[at + REUSABLE]:
        return False
    take(mem, ses, at, blocks)
    if mem[at + RUN] > seqs:
        set_entry(mem, at, RUN_DONE, seqs, have + chunk)
        set_entry(mem, at, RUN_CHUNK, seqs, chunk)
        budget -= chunk
    budget = admit_waiting(req, mem, ses, at, budget)
    mem[at + BEGIN] = NEVER
    if budget < mem[at + BUDGET]:
        whole = cost(mem, at, mem[at + BATCH], seqs, seqs, mem[at + CONTEXT])
        send_through(mem, at, now, mem[at + BATCH], whole)
        mem[at + JUMP] = mem[at + FAST] = 1
    refresh(mem, at)
    return True


@compiled
def begin(req: Flat, mem: Flat, ses: Flat, at: int, now: int, skip: int) -> None:
    """Begin an engine's next step, or many at once if possible."""
    weigh(mem, at, now)
    begun = False
    if skip == 1 and mem[at + STAGES] == 1 and (mem[at + LOCKED] == 1 or lock(mem, at)):
        begun = begin_jump(req, mem, at, now) or begin_fast(req, mem, ses, at, now)
        if not begun:
            unlock(mem, ses, at)
    if not begun:
        schedule(req, mem, ses, at, now)
    mark(mem, at)


@compiled
def set_end(mem: Flat, at: int) -> None:
    """Set the time at which the jump ends."""
    end = mem[at + JUMP_START] + jump_ps(mem, at, mem[at + JUMP])
    mem[at + END] = end
    set_entry(mem, at, BATCH_END, 0, end)
    set_entry(mem, at, STAGE_FREE, 0, end)
    refresh(mem, at)


@compiled
def steps_until(mem: Flat, at: int, now: int) -> int:
    """The first step of the jump that ends at ``now`` or later, counted from 1."""
    low, high = 1, mem[at + JUMP]
    start = mem[at + JUMP_START]
    while low < high:
        middle = (low + high) // 2
        if start + jump_ps(mem, at, middle) >= now:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def cut(mem: Flat, at: int, now: int) -> None:
    """End the jump with the step in flight."""
    if mem[at + JUMP] > 1:
        mem[at + JUMP] = steps_until(mem, at, now)
        set_end(mem, at)


@compiled
def arrived(mem: Flat, at: int, now: int, request: int) -> None:
    """Cut the jump if a request that entered the queue could be admitted."""
    if mem[at + WAIT] == request and mem[at + RUN] < mem[at + SEQS]:
        cut(mem, at, now)


@compiled
def settle(mem: Flat, ses: Flat, at: int, steps: int) -> None:
    """Account for the next ``steps``, which are over."""
    seqs = mem[at + STEADY_RUN]
    if mem[at + FAST] == 0:
        take(mem, ses, at, blocks_in(mem, at, steps))
        spent = jump_ps(mem, at, steps)
        mem[at + BUSY] += spent
        mem[at + STEPS] += steps
        mem[at + JUMP_START] += spent
    mem[at + GENERATED] += steps * seqs
    mem[at + CONTEXT] += steps * seqs
    mem[at + TICK] += steps
    mem[at + JUMP] -= steps


@compiled
def catch_up(mem: Flat, ses: Flat, at: int, now: int) -> None:
    """Account for the steps of a jump that have ended; the one in flight stays."""
    if mem[at + JUMP] > 1:
        steps = steps_until(mem, at, now + 1) - 1
        if steps > 0:
            settle(mem, ses, at, steps)


@compiled
def free_blocks(mem: Flat, at: int, now: int) -> int:
    """Blocks that no request holds at a time, before steps that begin then."""
    free = mem[at + FREE] + mem[at + REUSABLE]
    if mem[at + JUMP] > 0 and mem[at + FAST] == 0:
        free -= blocks_in(mem, at, steps_until(mem, at, now))
    return free


@compiled
def done_of(mem: Flat, at: int, slot: int) -> int:
    """Tokens of a running sequence that have KV, or are being computed with its prompt."""
    done = entry(mem, at, RUN_DONE, slot)
    return done + mem[at + TICK] if slot < steady(mem, at) else done


@compiled
def left_of(mem: Flat, at: int, slot: int) -> int:
    """Tokens that a running sequence has yet to emit."""
    left = entry(mem, at, RUN_LEFT, slot)
    return left - mem[at + TICK] if slot < steady(mem, at) else left


@compiled
def steady(mem: Flat, at: int) -> int:
    """The number of sequences counted in lockstep."""
    return mem[at + STEADY_RUN] if mem[at + LOCKED] == 1 else 0
