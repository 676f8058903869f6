"""One engine step: the batch that vLLM's V1 scheduler makes, and how long it takes.

Running sequences come first, in order of admission, each with the tokens it has left to compute
(one if it decodes), within the token budget. Where blocks run out, the scheduler preempts the last
admitted sequence (or that of the lowest priority), which will be recomputed. Only if it preempted
none, it admits from the head of the queue while there are budget, places and blocks for all known
tokens of that request.

A sequence with one token left to compute counts as decoding, whatever that token is. With pipeline
parallelism as many steps as stages are in flight; a step spends an equal share of its time in each.
"""

from oserve.sim.access import column, entry, set_entry
from oserve.sim.blocks import blocks_of, claim, reserved, take
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BATCH,
    BATCH_END,
    BATCHES,
    BEGIN,
    BUDGET,
    BUSY,
    COMPUTED,
    COPIED,
    DUE,
    END,
    FREE,
    KV_RATE,
    LOADING,
    MADE,
    NEVER,
    NEW,
    NONE,
    OF_SESSION,
    ORDERED,
    OUTPUT,
    PAIR_BITS,
    PAIR_RATE,
    PHASE,
    PREEMPTED,
    PREEMPTIONS,
    PRIORITY,
    PROMPT,
    PROMPTED,
    READY_AT,
    REQUEST,
    REUSABLE,
    REUSED,
    RUN,
    RUN_BATCH,
    RUN_CHUNK,
    RUN_DONE,
    RUN_GOAL,
    RUN_ID,
    RUN_LEFT,
    RUN_STATE,
    RUNNING,
    SEQS,
    STAGE_FREE,
    STAGES,
    STATUS,
    STEPS,
    TABLE_DECODES,
    TABLE_JOINT,
    TABLE_PROMPTS,
    WAIT,
    WAIT_COUNT,
    WAITING,
)
from oserve.sim.lists import insert_before, insert_ordered, unlink
from oserve.sim.state import Flat


@compiled
def refresh(mem: Flat, at: int) -> None:
    """Set when the replica's next event is due."""
    due = min(mem[at + END], mem[at + BEGIN])
    if mem[at + PHASE] == LOADING:
        due = min(due, mem[at + READY_AT])
    mem[at + DUE] = due


@compiled
def touch(mem: Flat, at: int, now: int) -> None:
    """After a change: begin a step as soon as the first stage is free."""
    if mem[at + BATCHES] < mem[at + STAGES] and mem[at + RUN] + mem[at + WAIT_COUNT] > 0:
        mem[at + BEGIN] = max(now, entry(mem, at, STAGE_FREE, 0))
    refresh(mem, at)


@compiled
def step_ps(mem: Flat, at: int, prompts: int, decodes: int, context: int, pairs: int) -> int:
    """Picoseconds of a step with these numbers of prompt tokens and decoding sequences."""
    if prompts > 0:
        whole = entry(mem, at, TABLE_PROMPTS, prompts + decodes)
        whole += entry(mem, at, TABLE_JOINT, decodes)
    else:
        whole = entry(mem, at, TABLE_DECODES, decodes)
    return whole + mem[at + KV_RATE] * context + ((mem[at + PAIR_RATE] * pairs) >> PAIR_BITS)


@compiled
def move_slot(mem: Flat, at: int, source: int, target: int) -> None:
    """Copy a running sequence's entries to another slot."""
    for field in range(RUN_ID, RUN_CHUNK + 1):
        start = column(mem, at, field)
        mem[start + target] = mem[start + source]


@compiled
def drop_slot(mem: Flat, at: int, slot: int) -> None:
    """Remove a running sequence and close the gap."""
    last = mem[at + RUN] - 1
    for place in range(slot, last):
        move_slot(mem, at, place + 1, place)
    mem[at + RUN] = last


@compiled
def victim_of(req: Flat, mem: Flat, at: int) -> int:
    """The slot of the running sequence to preempt."""
    last = mem[at + RUN] - 1
    if mem[at + ORDERED] == 0:
        return last
    ids = column(mem, at, RUN_ID)
    worst = last
    for slot in range(last):
        one, other = mem[ids + slot], mem[ids + worst]
        first, second = req[one * REQUEST + PRIORITY], req[other * REQUEST + PRIORITY]
        if first > second or (first == second and one > other):
            worst = slot
    return worst


@compiled
def preempt(req: Flat, mem: Flat, at: int, slot: int) -> None:
    """Preempt a running sequence, to the front of the queue (or where its priority puts it)."""
    request = entry(mem, at, RUN_ID, slot)
    base = request * REQUEST
    mem[at + FREE] += blocks_of(mem, at, entry(mem, at, RUN_DONE, slot))
    mem[at + FREE] += reserved(req, mem, at, request)
    req[base + MADE] = req[base + OUTPUT] - entry(mem, at, RUN_LEFT, slot)
    req[base + COMPUTED] = req[base + COPIED] = 0
    req[base + STATUS] = WAITING
    req[base + PREEMPTIONS] += 1
    mem[at + PREEMPTED] += 1
    drop_slot(mem, at, slot)
    if mem[at + ORDERED] == 0:
        insert_before(req, mem, at + WAIT, request, mem[at + WAIT])
    else:
        insert_ordered(req, mem, at + WAIT, request)


@compiled
def run_on(req: Flat, mem: Flat, ses: Flat, at: int) -> tuple[int, int]:
    """Schedule tokens of running sequences; returns the budget left and the number preempted.

    RUN_CHUNK of a slot is its number of tokens in this step.
    """
    budget, preempted, slot = mem[at + BUDGET], 0, 0
    done, goal = column(mem, at, RUN_DONE), column(mem, at, RUN_GOAL)
    chunks = column(mem, at, RUN_CHUNK)
    while slot < mem[at + RUN]:
        have = mem[done + slot]
        chunk = min(mem[goal + slot] - have, budget)
        blocks = blocks_of(mem, at, have + chunk) - blocks_of(mem, at, have)
        alone = False
        while blocks > mem[at + FREE] + mem[at + REUSABLE] and not alone:
            victim = victim_of(req, mem, at)
            alone = victim == slot
            if victim < slot:
                budget += mem[chunks + victim]
                slot -= 1
            preempt(req, mem, at, victim)
            preempted += 1
        if alone:
            break
        if blocks > 0:
            take(mem, ses, at, blocks)
        mem[done + slot] = have + chunk
        mem[chunks + slot] = chunk
        budget -= chunk
        slot += 1
    for place in range(slot, mem[at + RUN]):
        mem[chunks + place] = 0
    return budget, preempted


@compiled
def admissible(req: Flat, mem: Flat, at: int) -> bool:
    """Whether there are a slot and blocks for the head of the queue."""
    head = mem[at + WAIT]
    if head == NONE or mem[at + RUN] >= mem[at + SEQS]:
        return False
    known = req[head * REQUEST + PROMPT] + req[head * REQUEST + MADE]
    blocks = blocks_of(mem, at, known) + reserved(req, mem, at, head)
    return bool(blocks <= mem[at + FREE] + mem[at + REUSABLE])


@compiled
def admit(req: Flat, mem: Flat, ses: Flat, at: int, budget: int) -> None:
    """Admit the head of the queue, with as many tokens as the budget allows."""
    request = mem[at + WAIT]
    base = request * REQUEST
    unlink(req, mem, at + WAIT, request)
    known = req[base + PROMPT] + req[base + MADE]
    have = req[base + COMPUTED]
    if have == 0:
        have = claim(mem, ses, at, req[base + OF_SESSION], known)
        req[base + REUSED] += have
    chunk = min(known - have, budget)
    take(mem, ses, at, blocks_of(mem, at, have + chunk) + reserved(req, mem, at, request))
    slot = mem[at + RUN]
    mem[at + RUN] = slot + 1
    set_entry(mem, at, RUN_ID, slot, request)
    set_entry(mem, at, RUN_DONE, slot, have + chunk)
    set_entry(mem, at, RUN_GOAL, slot, known)
    set_entry(mem, at, RUN_LEFT, slot, req[base + OUTPUT] - req[base + MADE])
    set_entry(mem, at, RUN_BATCH, slot, NONE)
    set_entry(mem, at, RUN_STATE, slot, NEW)
    set_entry(mem, at, RUN_CHUNK, slot, chunk)
    req[base + STATUS] = RUNNING


@compiled
def admit_waiting(req: Flat, mem: Flat, ses: Flat, at: int, budget: int) -> int:
    """Admit from the queue while there is room; returns the budget left."""
    while budget > 0 and admissible(req, mem, at):
        admit(req, mem, ses, at, budget)
        budget -= entry(mem, at, RUN_CHUNK, mem[at + RUN] - 1)
    return budget


@compiled
def fill(req: Flat, mem: Flat, ses: Flat, at: int) -> tuple[int, int]:
    """Form the next step: its number of tokens, and how many sequences were preempted."""
    budget, preempted = run_on(req, mem, ses, at)
    if preempted == 0:
        budget = admit_waiting(req, mem, ses, at, budget)
    return mem[at + BUDGET] - budget, preempted


@compiled
def cost(mem: Flat, at: int, batch: int, first: int, decodes: int, context: int) -> int:
    """Picoseconds of the step just formed, whose new tokens come when ``batch`` ends.

    Sequences before slot ``first`` decode: ``decodes`` of them, over ``context`` tokens.
    """
    done, goal = column(mem, at, RUN_DONE), column(mem, at, RUN_GOAL)
    chunks, batches = column(mem, at, RUN_CHUNK), column(mem, at, RUN_BATCH)
    prompts = pairs = 0
    for slot in range(first, mem[at + RUN]):
        chunk = mem[chunks + slot]
        if chunk == 0:
            continue
        have, whole = mem[done + slot], mem[goal + slot]
        if have == whole:
            mem[batches + slot] = batch
        if chunk == 1 and have == whole:
            decodes += 1
            context += whole
        else:
            prompts += chunk
            pairs += chunk * (have - chunk) + chunk * (chunk + 1) // 2
    mem[at + PROMPTED] += prompts
    return step_ps(mem, at, prompts, decodes, context, pairs)


@compiled
def send_through(mem: Flat, at: int, now: int, batch: int, whole: int) -> None:
    """Send a step through the stages, each of which runs one step at a time."""
    share = whole // mem[at + STAGES]
    stages = column(mem, at, STAGE_FREE)
    moment = now
    for stage in range(mem[at + STAGES]):
        moment = max(moment, mem[stages + stage]) + share
        mem[stages + stage] = moment
    set_entry(mem, at, BATCH_END, batch, moment)
    mem[at + BUSY] += share
    mem[at + STEPS] += 1
    mem[at + BATCHES] += 1
    mem[at + END] = entry(mem, at, BATCH_END, mem[at + BATCH])


@compiled
def schedule(req: Flat, mem: Flat, ses: Flat, at: int, now: int) -> None:
    """Begin a step, if there is anything to compute."""
    tokens, preempted = fill(req, mem, ses, at)
    # If all running sequences were preempted, the head of the queue may be admitted at once.
    while tokens == 0 and preempted > 0:
        tokens, preempted = fill(req, mem, ses, at)
    mem[at + BEGIN] = NEVER
    if tokens > 0:
        batch = (mem[at + BATCH] + mem[at + BATCHES]) % mem[at + STAGES]
        send_through(mem, at, now, batch, cost(mem, at, batch, 0, 0, 0))
        if mem[at + BATCHES] < mem[at + STAGES]:
            mem[at + BEGIN] = entry(mem, at, STAGE_FREE, 0)
    refresh(mem, at)
