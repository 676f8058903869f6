"""Many deadlines at little cost: a timing wheel with buckets of one tick. Pure; no clock, no tasks.

Most deadlines of a server are cancelled or put off long before they pass, so setting and cancelling
take constant time, and only buckets that come due are looked at (Varghese and Lauck, 1987).
"""

import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """At most one deadline for each key, in seconds of the caller's clock.

    A key is never due early, and at most ``tick_s`` late. Equal calls return keys in equal order.
    """

    __slots__ = ("_bucket_of", "_buckets", "_due_s", "_order", "_per_s")

    def __init__(self, tick_s: float = 0.05) -> None:
        self._per_s = 1.0 / tick_s
        self._due_s: dict[K, float] = {}
        self._bucket_of: dict[K, int] = {}
        # Dictionaries serve as sets in order of insertion: equal calls give equal orders.
        self._buckets: dict[int, dict[K, None]] = {}
        # Numbers of buckets, each once; one may have become empty since.
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._due_s)

    def __contains__(self, key: K) -> bool:
        return key in self._due_s

    @property
    def next_s(self) -> float | None:
        """When to call ``due`` next; ``None`` while no key has a deadline."""
        while self._order:
            first = self._order[0]
            if self._buckets[first]:
                return first / self._per_s
            heapq.heappop(self._order)
            del self._buckets[first]
        return None

    def set(self, key: K, due_s: float) -> None:
        """Set the deadline of a key, or move it."""
        self._due_s[key] = due_s
        number = math.ceil(due_s * self._per_s)
        before = self._bucket_of.get(key)
        if before is not None:
            # A later deadline is looked up when the earlier bucket comes due.
            if before <= number:
                return
            del self._buckets[before][key]
        self._put(key, number)

    def _put(self, key: K, number: int) -> None:
        self._bucket_of[key] = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = {key: None}
            heapq.heappush(self._order, number)
        else:
            bucket[key] = None

    def cancel(self, key: K) -> None:
        """Forget a key; harmless if it has no deadline."""
        number = self._bucket_of.pop(key, None)
        if number is not None:
            del self._due_s[key]
            del self._buckets[number][key]

    def due(self, now_s: float) -> list[K]:
        """Remove and return the keys whose deadline has passed, earliest bucket first."""
        passed: list[K] = []
        while self._order and self._order[0] <= now_s * self._per_s:
            for key in self._buckets.pop(heapq.heappop(self._order)):
                number = math.ceil(self._due_s[key] * self._per_s)
                if number <= now_s * self._per_s:
                    del self._due_s[key], self._bucket_of[key]
                    passed.append(key)
                else:
                    self._put(key, number)
        return passed
