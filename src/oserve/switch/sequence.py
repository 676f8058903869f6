"""The steps in which new replicas start, so that the least capacity on the way is largest.

A widest-path search over sets of started replicas. With few replicas a step may start any set. With
many, steps start subsets of replicas that overlap, and whole groups of them. Among paths that keep
the whole floor, those of few and large steps come first; then neighbouring steps are joined where
that costs nothing.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

# Up to this many replicas every set may be a step, so the result is optimal.
_EVERY_SET = 8
_GROUP_SETS = 5
_MOST_VISITS = 4000


class Board(Protocol):
    """What the search needs of replicas; sets are bit masks of new or of old replicas."""

    count: int
    overlaps: list[int]

    def share(self, started: int, starting: int, gone: int) -> float: ...

    def gone(self, started: int) -> int: ...

    def fills(self, started: int, starting: int) -> bool: ...

    def components(self, among: int) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequenced:
    """Sets of replicas to start, step by step, and the share of the floor that is kept."""

    steps: tuple[int, ...]
    share: float
    proved: bool


def best_sequence(board: Board) -> Sequenced | None:
    """Return the sequence that keeps most of the floor, with few steps; None if there is none."""
    every = (1 << board.count) - 1
    order = count()
    # A share above the whole floor is worth nothing: then few steps come first.
    heap: list[tuple[float, int, int, int, tuple[int, ...]]] = [(-1.0, 0, next(order), 0, ())]
    done: set[int] = set()
    while heap and len(done) < _MOST_VISITS:
        negative, _, _, started, steps = heapq.heappop(heap)
        if started == every:
            share = min(-negative, _worst(board, steps))
            proved = share >= 1.0 or board.count <= _EVERY_SET
            joined = _joined(board, steps, min(1.0, share))
            return Sequenced(steps=joined, share=_worst(board, joined), proved=proved)
        if started in done:
            continue
        done.add(started)
        for starting in _steps(board, every & ~started):
            after = started | starting
            if after in done or not board.fills(started, starting):
                continue
            share = min(-negative, _step_share(board, started, starting))
            left = board.count - after.bit_count()
            heapq.heappush(heap, (-share, left, next(order), after, (*steps, starting)))
    return None if not heap else _hasty(board)


def _hasty(board: Board) -> Sequenced | None:
    """Return one group after the other, after the search has reached its limit."""
    steps = tuple(board.components((1 << board.count) - 1))
    started = 0
    for starting in steps:
        if not board.fills(started, starting):
            return None
        started |= starting
    return Sequenced(steps=steps, share=_worst(board, steps), proved=False)


def _step_share(board: Board, started: int, starting: int) -> float:
    """Return the least share before and right after the commit of a step."""
    after = started | starting
    return min(
        board.share(started, starting, board.gone(started)),
        board.share(after, 0, board.gone(after)),
    )


def _worst(board: Board, steps: tuple[int, ...]) -> float:
    worst = float("inf")
    started = 0
    for starting in steps:
        worst = min(worst, _step_share(board, started, starting))
        started |= starting
    return worst


def _steps(board: Board, left: int) -> Iterator[int]:
    free = sum(1 << index for index in range(board.count) if not board.overlaps[index]) & left
    if free:
        # They overlap no old replica: starting them first can only help.
        yield free
        if board.count > _EVERY_SET:
            return
    if board.count <= _EVERY_SET:
        yield from _subsets(left)
        return
    yield left
    for group in board.components(left):
        if group.bit_count() <= _GROUP_SETS:
            yield from _subsets(group)
            continue
        yield group
        own = [index for index in range(board.count) if group >> index & 1]
        for index in own:
            yield 1 << index
            near = [1 << other for other in own if board.overlaps[other] & board.overlaps[index]]
            yield sum(near)


def _subsets(mask: int) -> Iterator[int]:
    """Yield all non-empty subsets, the largest first."""
    part = mask
    while part:
        yield part
        part = (part - 1) & mask


def _joined(board: Board, steps: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Join neighbouring steps where that keeps the share."""
    joined: list[int] = []
    started = 0
    for step in steps:
        if joined:
            before = started & ~joined[-1]
            both = joined[-1] | step
            if board.fills(before, both) and _step_share(board, before, both) >= share:
                joined[-1] = both
                started |= step
                continue
        joined.append(step)
        started |= step
    return tuple(joined)
