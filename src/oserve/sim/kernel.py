"""The event loop of the kernel.

The events of one time have a fixed order: replicas become ready, steps end, KV transfers end,
requests arrive, the gateway dispatches, refuses and sheds, new steps begin. Replicas go in order of
number, requests in order of arrival. Changes by the caller between two calls come last.
"""

from oserve.sim.access import column, entry, set_entry
from oserve.sim.blocks import forget, mark, weigh, whole_of
from oserve.sim.compiled import compiled
from oserve.sim.completion import close, end_step, receive, unbook
from oserve.sim.gateway import enter, enter_again, next_to_shed, settle
from oserve.sim.layout import (
    ARRIVAL,
    ARRIVED,
    BATCHES,
    BEGIN,
    BLOCKS,
    COMPUTED,
    COPIED,
    DUE,
    END,
    FREE,
    FREED,
    GONE,
    LEAVING,
    LINK_FREE,
    LINK_PS_PER_TOKEN,
    LOADING,
    LOST,
    MADE,
    MOVED_AT,
    MOVED_FROM,
    MOVED_TO,
    NEVER,
    NONE,
    NOW,
    ON,
    OUTPUT,
    PHASE,
    READY,
    READY_AT,
    RECENT,
    RECENT_COUNT,
    RELEASED,
    REPLICAS,
    REQUEST,
    RUN,
    RUN_DONE,
    RUN_ID,
    RUN_LEFT,
    RUN_STATE,
    RUNNING,
    SHED_AT,
    SHEDS,
    STAGE_FREE,
    STAGES,
    STATUS,
    STEADY,
    WAIT,
    WAIT_COUNT,
    WAITS,
)
from oserve.sim.lists import unlink
from oserve.sim.lockstep import begin, catch_up, cut, done_of, left_of, unlock
from oserve.sim.schedule import refresh
from oserve.sim.shares import correct_charge, seen
from oserve.sim.state import KernelState


@compiled
def next_moment(s: KernelState) -> int:
    """The time of the next event."""
    moment = NEVER
    for index in range(s.glob[REPLICAS]):
        moment = min(moment, s.mem[s.where[index] + DUE])
    if s.glob[ARRIVED] < s.glob[RELEASED]:
        moment = min(moment, s.req[s.glob[ARRIVED] * REQUEST + ARRIVAL])
    if s.moves[0] > 0:
        moment = min(moment, s.req[s.moves[1] * REQUEST + MOVED_AT])
    if s.glob[SHEDS] == 1 and s.glob[WAITS] > 0:
        waiting = next_to_shed(s)
        if waiting != NONE:
            moment = min(moment, s.req[waiting * REQUEST + SHED_AT])
    return moment


@compiled
def begin_steps(s: KernelState, now: int, skip: int) -> None:
    """Begin the next step of each engine that is due, or many steps at once if ``skip``."""
    mem = s.mem
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if mem[at + BEGIN] == now:
            begin(s.req, mem, s.ses, at, now, skip)


@compiled
def end_steps(s: KernelState, now: int) -> None:
    """Make replicas ready and end steps."""
    mem = s.mem
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if mem[at + DUE] != now:
            continue
        if mem[at + PHASE] == LOADING and mem[at + READY_AT] == now:
            mem[at + PHASE] = READY
            s.glob[FREED] = 1
            refresh(mem, at)
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if mem[at + END] == now:
            end_step(s, at, now)


@compiled
def advance(s: KernelState, until: int, skip: int) -> None:
    """Process all events up to and at a time."""
    while True:
        now = next_moment(s)
        if now > until or now == NEVER:
            break
        s.glob[NOW] = now
        end_steps(s, now)
        while s.moves[0] > 0 and s.req[s.moves[1] * REQUEST + MOVED_AT] == now:
            homeless = receive(s, now)
            if homeless != NONE:
                enter_again(s, homeless, now)
        first = s.glob[ARRIVED]
        while (
            s.glob[ARRIVED] < s.glob[RELEASED] and s.req[s.glob[ARRIVED] * REQUEST + ARRIVAL] <= now
        ):
            s.glob[ARRIVED] += 1
            seen(s, s.glob[ARRIVED] - 1, now)
            enter(s, s.glob[ARRIVED] - 1)
        if s.glob[WAITS] > 0:
            settle(s, first, now)
        begin_steps(s, now, skip)


@compiled
def observe(s: KernelState, now: int) -> None:
    """Update the entries of replicas and their requests to the present time."""
    req, mem = s.req, s.mem
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        catch_up(mem, s.ses, at, now)
        weigh(mem, at, now)
        mark(mem, at)
        for slot in range(mem[at + RUN]):
            base = entry(mem, at, RUN_ID, slot) * REQUEST
            req[base + MADE] = req[base + OUTPUT] - left_of(mem, at, slot)
            req[base + COMPUTED] = done_of(mem, at, slot)


@compiled
def flush(s: KernelState, skip: int) -> None:
    """Dispatch and begin steps after a change by the caller, at the present time."""
    now = s.glob[NOW]
    # If a step ended now, the next one has begun, and a request that enters now misses it.
    observe(s, now)
    if s.glob[WAITS] > 0:
        s.glob[FREED] = 1
        settle(s, s.glob[ARRIVED], now)
    begin_steps(s, now, skip)


@compiled
def own_numbers(s: KernelState, at: int, now: int) -> None:
    """Cut a jump to the step in flight, and give every sequence its own entries."""
    catch_up(s.mem, s.ses, at, now)
    cut(s.mem, at, now + 1)
    unlock(s.mem, s.ses, at)


@compiled
def lose(s: KernelState, request: int, again: int, now: int) -> None:
    """Retry or resume a request whose replica has ended if ``again``, else end it as lost."""
    if again == 1:
        enter_again(s, request, now)
    else:
        correct_charge(s, request)
        close(s, request, LOST, now)


@compiled
def remove(s: KernelState, index: int, again: int, now: int) -> None:
    """Remove a replica at once. Its requests continue if ``again``, else they are lost."""
    req, mem, at = s.req, s.mem, s.where[index]
    own_numbers(s, at, now)
    weigh(mem, at, now)
    mem[at + PHASE] = GONE
    mem[at + END] = mem[at + BEGIN] = NEVER
    mem[at + BATCHES] = 0
    refresh(mem, at)
    for slot in range(mem[at + RUN]):
        request = entry(mem, at, RUN_ID, slot)
        base = request * REQUEST
        req[base + MADE] = req[base + OUTPUT] - entry(mem, at, RUN_LEFT, slot)
        req[base + COPIED] = 0
        unbook(req, mem, s.glob, at, request)
        lose(s, request, again, now)
    mem[at + RUN] = 0
    while mem[at + WAIT_COUNT] > 0:
        request = mem[at + WAIT]
        unlink(req, mem, at + WAIT, request)
        unbook(req, mem, s.glob, at, request)
        lose(s, request, again, now)
    while mem[at + RECENT_COUNT] > 0:
        forget(mem, s.ses, at, mem[at + RECENT])
    mem[at + FREE] = mem[at + BLOCKS]
    mark(mem, at)
    # Requests in transfer have lost their source, and start over when they would have arrived.
    for place in range(1, s.moves[0] + 1):
        base = s.moves[place] * REQUEST
        if req[base + MOVED_FROM] == index:
            req[base + MOVED_FROM] = NONE


@compiled
def hang(s: KernelState, index: int, now: int) -> None:
    """Make a replica hang: none of its steps ends or begins, and it does not become ready."""
    mem, at = s.mem, s.where[index]
    own_numbers(s, at, now)
    for stage in range(mem[at + STAGES]):
        set_entry(mem, at, STAGE_FREE, stage, NEVER)
    mem[at + END] = mem[at + BEGIN] = mem[at + READY_AT] = NEVER
    refresh(mem, at)


@compiled
def migrate(s: KernelState, request: int, target: int, now: int) -> bool:
    """Begin to copy a running request's KV to another replica, while it continues to decode."""
    req, mem = s.req, s.mem
    base = request * REQUEST
    if req[base + STATUS] != RUNNING or req[base + ON] == target:
        return False
    at = s.where[req[base + ON]]
    other = s.where[target]
    whole = whole_of(req, mem, other, request)
    if mem[other + PHASE] != READY or whole > mem[other + BLOCKS]:
        return False
    own_numbers(s, at, now)
    ids, states = column(mem, at, RUN_ID), column(mem, at, RUN_STATE)
    slot = 0
    while mem[ids + slot] != request:
        slot += 1
    if mem[states + slot] != STEADY:
        return False
    mem[states + slot] = LEAVING
    req[base + COPIED] = entry(mem, at, RUN_DONE, slot)
    begin = max(now, mem[at + LINK_FREE])
    mem[at + LINK_FREE] = begin + req[base + COPIED] * mem[at + LINK_PS_PER_TOKEN]
    req[base + MOVED_AT] = mem[at + LINK_FREE]
    req[base + MOVED_TO] = target
    return True
