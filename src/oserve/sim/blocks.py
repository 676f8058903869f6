"""Blocks of KV cache: allocated, freed, and kept for the next turn of a session.

Blocks that a session's last turn left behind count as free. They are evicted from the least recent
session on, and within a session from its end, as in vLLM's queue of free blocks.

A sequence draws TABLES blocks every BLOCK_TOKENS tokens. While it runs, it also holds STATE_BLOCKS,
and in each of WINDOW_TABLES what WINDOW_TOKENS tokens take, or all its tokens with its answer if
these are fewer, in blocks of WINDOW_BLOCK tokens: a window is reserved whole, as it fills soon.
Blocks so reserved are not kept for a next turn.

KV_AREA adds up the blocks in use over time: twice the block microseconds up to KV_AT, when KV_USED
were in use. Between two counts the use counts as linear, as it nearly is while sequences decode.
KV_PEAK is the most blocks in use at the end of a step.
"""

from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BLOCK,
    BLOCK_TOKENS,
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
    OUTPUT,
    PROMPT,
    RECENT,
    RECENT_COUNT,
    RECENT_TAIL,
    REQUEST,
    REUSABLE,
    SESSION,
    SESSION_NEXT,
    SESSION_PREVIOUS,
    STATE_BLOCKS,
    TABLES,
    US,
    WINDOW_BLOCK,
    WINDOW_TABLES,
    WINDOW_TOKENS,
)
from oserve.sim.state import Flat


@compiled
def units_of(tokens: int) -> int:
    """The size of a request of so many tokens, whatever the replica."""
    return (tokens + BLOCK - 1) // BLOCK


@compiled
def blocks_of(mem: Flat, at: int, tokens: int) -> int:
    """Blocks that hold so many tokens, besides those reserved for the sequence."""
    size = mem[at + BLOCK_TOKENS]
    return mem[at + TABLES] * ((tokens + size - 1) // size)


@compiled
def reserved(req: Flat, mem: Flat, at: int, request: int) -> int:
    """Blocks that a sequence holds whatever it has computed."""
    tables = mem[at + WINDOW_TABLES]
    if tables == 0:
        return mem[at + STATE_BLOCKS]
    base, size = request * REQUEST, mem[at + WINDOW_BLOCK]
    tokens = min(mem[at + WINDOW_TOKENS], req[base + PROMPT] + req[base + OUTPUT])
    return mem[at + STATE_BLOCKS] + tables * ((tokens + size - 1) // size)


@compiled
def whole_of(req: Flat, mem: Flat, at: int, request: int) -> int:
    """The most blocks that a request holds."""
    base = request * REQUEST
    tokens = req[base + PROMPT] + req[base + OUTPUT]
    return blocks_of(mem, at, tokens) + reserved(req, mem, at, request)


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
    mem[at + FREE] += blocks_of(mem, at, tokens)
    if session == NONE:
        return
    holder = ses[session * SESSION + HELD_BY]
    if holder != NONE:
        forget(mem, ses, where[holder], session)
    kept = mem[at + TABLES] * (tokens // mem[at + BLOCK_TOKENS])
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
    size = mem[at + BLOCK_TOKENS]
    held = ses[session * SESSION + HELD_BLOCKS] // mem[at + TABLES]
    cached = min(held, (tokens - 1) // size) * size
    forget(mem, ses, at, session)
    return cached
