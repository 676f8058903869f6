"""Blocks of KV cache: allocated, freed, and kept for the next turn of a session.

Blocks that a session's last turn left behind count as free. They are evicted from the least recent
session on, and within a session from its end, as in vLLM's queue of free blocks.

KV_AREA adds up the blocks in use over time: twice the block microseconds up to KV_AT, when KV_USED
were in use. Between two counts the use counts as linear, as it nearly is while sequences decode.
KV_PEAK is the most blocks in use at the end of a step.
"""

from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BLOCK,
    BLOCKS,
    FREE,
    HELD_BLOCKS,
    HELD_BY,
    INDEX,
    KV_AREA,
    KV_AT,
    KV_PEAK,
    KV_USED,
    NONE,
    RECENT,
    RECENT_COUNT,
    RECENT_TAIL,
    REUSABLE,
    SESSION,
    SESSION_NEXT,
    SESSION_PREVIOUS,
    US,
)
from oserve.sim.state import Flat


@compiled
def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return (tokens + BLOCK - 1) // BLOCK


@compiled
def weigh(mem: Flat, at: int, now: int) -> None:
    """Add up the blocks in use until now, before some are allocated or freed."""
    spent = (now - mem[at + KV_AT]) // US
    used = mem[at + BLOCKS] - mem[at + FREE] - mem[at + REUSABLE]
    mem[at + KV_AREA] += (mem[at + KV_USED] + used) * spent
    mem[at + KV_AT] += spent * US
    mem[at + KV_PEAK] = max(mem[at + KV_PEAK], used)


@compiled
def mark(mem: Flat, at: int) -> None:
    """Note the blocks in use from now on."""
    mem[at + KV_USED] = mem[at + BLOCKS] - mem[at + FREE] - mem[at + REUSABLE]


@compiled
def take(mem: Flat, ses: Flat, at: int, blocks: int) -> None:
    """Allocate free blocks; if none are empty, evict those of old sessions."""
    mem[at + FREE] -= blocks
    while mem[at + FREE] < 0:
        session = mem[at + RECENT]
        evicted = min(ses[session * SESSION + HELD_BLOCKS], -mem[at + FREE])
        ses[session * SESSION + HELD_BLOCKS] -= evicted
        mem[at + REUSABLE] -= evicted
        mem[at + FREE] += evicted
        if ses[session * SESSION + HELD_BLOCKS] == 0:
            forget(mem, ses, at, session)


@compiled
def forget(mem: Flat, ses: Flat, at: int, session: int) -> None:
    """Evict all blocks of a session on this replica."""
    mem[at + REUSABLE] -= ses[session * SESSION + HELD_BLOCKS]
    mem[at + FREE] += ses[session * SESSION + HELD_BLOCKS]
    ses[session * SESSION + HELD_BLOCKS] = 0
    ses[session * SESSION + HELD_BY] = NONE
    following = ses[session * SESSION + SESSION_NEXT]
    previous = ses[session * SESSION + SESSION_PREVIOUS]
    if previous == NONE:
        mem[at + RECENT] = following
    else:
        ses[previous * SESSION + SESSION_NEXT] = following
    if following == NONE:
        mem[at + RECENT_TAIL] = previous
    else:
        ses[following * SESSION + SESSION_PREVIOUS] = previous
    mem[at + RECENT_COUNT] -= 1


@compiled
def retain(mem: Flat, ses: Flat, where: Flat, at: int, session: int, tokens: int) -> None:
    """Free the blocks of ``tokens``; the full ones stay cached for the session."""
    mem[at + FREE] += blocks_of(tokens)
    if session == NONE:
        return
    holder = ses[session * SESSION + HELD_BY]
    if holder != NONE:
        forget(mem, ses, where[holder], session)
    kept = tokens // BLOCK
    if kept == 0:
        return
    mem[at + FREE] -= kept
    mem[at + REUSABLE] += kept
    ses[session * SESSION + HELD_BY] = mem[at + INDEX]
    ses[session * SESSION + HELD_BLOCKS] = kept
    last = mem[at + RECENT_TAIL]
    ses[session * SESSION + SESSION_PREVIOUS] = last
    ses[session * SESSION + SESSION_NEXT] = NONE
    if last == NONE:
        mem[at + RECENT] = session
    else:
        ses[last * SESSION + SESSION_NEXT] = session
    mem[at + RECENT_TAIL] = session
    mem[at + RECENT_COUNT] += 1


@compiled
def claim(mem: Flat, ses: Flat, at: int, session: int, tokens: int) -> int:
    """Cached tokens at the start of a prompt of ``tokens``, which need not be computed.

    Their blocks become empty ones, and the caller allocates them at once. The last token is always
    computed, since its output is needed.
    """
    if session == NONE or ses[session * SESSION + HELD_BY] != mem[at + INDEX]:
        return 0
    cached = min(ses[session * SESSION + HELD_BLOCKS] * BLOCK, (tokens - 1) // BLOCK * BLOCK)
    forget(mem, ses, at, session)
    return cached
