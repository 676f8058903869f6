"""Many steps at once, in closed form, while nothing but decoding happens.

With d sequences of c tokens in all, step j (from 1) takes decodes[d] + kv_rate (c + d (j - 1)); so
the first j steps take j (decodes[d] + kv_rate c) + kv_rate d j (j - 1) / 2. That goes on until a
sequence ends or blocks run out. What comes meanwhile cuts it short at the end of a step.
"""

from oserve.sim.blocks import blocks_of, take
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BATCH_END,
    BATCHES,
    BEGIN,
    BLOCK,
    BUSY,
    END,
    FREE,
    GENERATED,
    JUMP,
    JUMP_CONTEXT,
    JUMP_START,
    KV_RATE,
    LONGEST_JUMP,
    NEVER,
    PHASES,
    REUSABLE,
    RUN,
    RUN_DONE,
    RUN_GOAL,
    RUN_LEFT,
    RUN_STATE,
    SEQS,
    STAGE_FREE,
    STAGES,
    STEADY,
    STEPS,
    TABLE_DECODES,
    WAIT,
)
from oserve.sim.schedule import admissible, refresh
from oserve.sim.state import Flat


@compiled
def jump_ps(mem: Flat, at: int, steps: int) -> int:
    """Picoseconds of the first so many steps of the jump."""
    rate, seqs = mem[at + KV_RATE], mem[at + RUN]
    first = mem[at + mem[at + TABLE_DECODES] + seqs] + rate * mem[at + JUMP_CONTEXT]
    return steps * first + rate * seqs * (steps * (steps - 1) // 2)


@compiled
def steps_with_room(mem: Flat, at: int, most: int) -> int:
    """Steps, at most ``most``, that all running sequences can take with the blocks there are."""
    seqs, room = mem[at + RUN], mem[at + FREE] + mem[at + REUSABLE]
    # Each takes one block in as many steps as a block has tokens.
    if seqs * ((most + BLOCK - 1) // BLOCK) <= room:
        return most
    phases, done = at + mem[at + PHASES], at + mem[at + RUN_DONE]
    for phase in range(BLOCK):
        mem[phases + phase] = 0
    for slot in range(seqs):
        # Steps before that in which it takes a block.
        mem[phases + (-mem[done + slot]) % BLOCK] += 1
    rounds = room // seqs
    room -= rounds * seqs
    steps = rounds * BLOCK
    for phase in range(BLOCK):
        room -= mem[phases + phase]
        if room < 0:
            break
        steps += 1
    return min(most, steps)


@compiled
def begin_jump(req: Flat, mem: Flat, at: int, now: int) -> bool:
    """Begin as many steps of decoding alone as can be foreseen; False if there are none.

    A head of the queue that finds no room now finds none until something ends: blocks only shrink.
    """
    seqs = mem[at + RUN]
    if mem[at + STAGES] > 1 or mem[at + BATCHES] > 0 or seqs == 0 or admissible(req, mem, at):
        return False
    states, left = at + mem[at + RUN_STATE], at + mem[at + RUN_LEFT]
    goal = at + mem[at + RUN_GOAL]
    # Who has emitted a token here has one to compute at a time.
    context, steps = 0, mem[at + LONGEST_JUMP]
    for slot in range(seqs):
        if mem[states + slot] != STEADY:
            return False
        context += mem[goal + slot]
        steps = min(steps, mem[left + slot])
    steps = steps_with_room(mem, at, steps)
    if steps == 0:
        return False
    mem[at + JUMP] = steps
    mem[at + JUMP_START] = now
    mem[at + JUMP_CONTEXT] = context
    mem[at + BATCHES] = 1
    mem[at + BEGIN] = NEVER
    set_end(mem, at)
    return True


@compiled
def set_end(mem: Flat, at: int) -> None:
    """Note when the jump ends."""
    end = mem[at + JUMP_START] + jump_ps(mem, at, mem[at + JUMP])
    mem[at + END] = end
    mem[at + mem[at + BATCH_END]] = end
    mem[at + mem[at + STAGE_FREE]] = end
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
    """End the jump with the step that is on its way."""
    if mem[at + JUMP] > 1:
        mem[at + JUMP] = steps_until(mem, at, now)
        set_end(mem, at)


@compiled
def arrived(mem: Flat, at: int, now: int, request: int) -> None:
    """A request came to the queue: cut the jump short if it could be admitted."""
    if mem[at + WAIT] == request and mem[at + RUN] < mem[at + SEQS]:
        cut(mem, at, now)


@compiled
def settle(mem: Flat, ses: Flat, at: int, steps: int) -> None:
    """Account for the first so many steps of the jump."""
    done, goal = at + mem[at + RUN_DONE], at + mem[at + RUN_GOAL]
    left = at + mem[at + RUN_LEFT]
    blocks = 0
    for slot in range(mem[at + RUN]):
        have = mem[done + slot]
        blocks += blocks_of(have + steps) - blocks_of(have)
        mem[done + slot] = have + steps
        mem[goal + slot] += steps
        mem[left + slot] -= steps
    if blocks > 0:
        take(mem, ses, at, blocks)
    spent = jump_ps(mem, at, steps)
    mem[at + BUSY] += spent
    mem[at + STEPS] += steps
    mem[at + GENERATED] += steps * mem[at + RUN]
    mem[at + JUMP_START] += spent
    mem[at + JUMP_CONTEXT] += steps * mem[at + RUN]
    mem[at + JUMP] -= steps


@compiled
def catch_up(mem: Flat, ses: Flat, at: int, now: int) -> None:
    """Account for the steps of a jump that have ended; the one on its way stays."""
    if mem[at + JUMP] > 1:
        steps = steps_until(mem, at, now + 1) - 1
        if steps > 0:
            settle(mem, ses, at, steps)


@compiled
def free_blocks(mem: Flat, at: int, now: int) -> int:
    """Blocks that no request holds at a moment, before steps that begin then."""
    free = mem[at + FREE] + mem[at + REUSABLE]
    if mem[at + JUMP] > 0:
        steps = steps_until(mem, at, now)
        done = at + mem[at + RUN_DONE]
        for slot in range(mem[at + RUN]):
            have = mem[done + slot]
            free -= blocks_of(have + steps) - blocks_of(have)
    return free
