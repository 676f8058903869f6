"""Maximum flow by preflow-push, in integers of any size.

First-in first-out preflow-push (Goldberg and Tarjan, "A new approach to the maximum-flow problem"):
nodes with excess push it along residual arcs that lead one level down, and are relabelled where
there is none. Exact initial heights and the gap rule make it fast.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Arc:
    """A directed arc; ``capacity`` is a whole number of at least 0."""

    tail: int
    head: int
    capacity: int


def max_flow(
    arcs: Sequence[Arc], *, node_count: int, source: int, sink: int
) -> tuple[int, tuple[int, ...]]:
    """The value of a maximum flow from source to sink, and the flow on each arc.

    Nodes are 0 to ``node_count`` - 1. Raises ValueError if source and sink are the same.
    """
    if source == sink:
        raise ValueError("source and sink are the same node")
    push = _Preflow(arcs, node_count, source, sink)
    push.run()
    return push.excess[sink], tuple(
        arc.capacity - push.residual[2 * index] for index, arc in enumerate(arcs)
    )


class _Preflow:
    """Residual arcs in pairs: 2k is arc k, 2k + 1 its reverse."""

    def __init__(self, arcs: Sequence[Arc], node_count: int, source: int, sink: int) -> None:
        self.source, self.sink, self.count = source, sink, node_count
        self.heads: list[int] = []
        self.residual: list[int] = []
        self.leaving: list[list[int]] = [[] for _ in range(node_count)]
        for arc in arcs:
            self.leaving[arc.tail].append(len(self.heads))
            self.leaving[arc.head].append(len(self.heads) + 1)
            self.heads += [arc.head, arc.tail]
            self.residual += [arc.capacity, 0]
        self.excess = [0] * node_count
        self.height = self._distances()
        self.at_height = [0] * (2 * node_count + 1)
        for height in self.height:
            self.at_height[height] += 1
        self.next_arc = [0] * node_count
        self.active: deque[int] = deque()

    def run(self) -> None:
        for index in self.leaving[self.source]:
            self._push(self.source, index, self.residual[index])
        while self.active:
            self._discharge(self.active.popleft())

    def _distances(self) -> list[int]:
        """Arcs to the sink; ``count`` for the source and for nodes that cannot reach it."""
        distance = [self.count] * self.count
        distance[self.sink] = 0
        queue = deque([self.sink])
        while queue:
            node = queue.popleft()
            for index in self.leaving[node]:
                tail = self.heads[index]
                # The reverse of an arc that leaves the node enters it.
                if self.residual[index ^ 1] > 0 and distance[tail] == self.count:
                    distance[tail] = distance[node] + 1
                    queue.append(tail)
        distance[self.source] = self.count
        return distance

    def _push(self, node: int, index: int, amount: int) -> None:
        if amount == 0:
            return
        head = self.heads[index]
        self.residual[index] -= amount
        self.residual[index ^ 1] += amount
        self.excess[node] -= amount
        if self.excess[head] == 0 and head not in {self.source, self.sink}:
            self.active.append(head)
        self.excess[head] += amount

    def _discharge(self, node: int) -> None:
        leaving = self.leaving[node]
        while self.excess[node] > 0:
            if self.next_arc[node] == len(leaving):
                self._rise(node)
                self.next_arc[node] = 0
                continue
            index = leaving[self.next_arc[node]]
            if self.residual[index] and self.height[node] == self.height[self.heads[index]] + 1:
                self._push(node, index, min(self.excess[node], self.residual[index]))
            else:
                self.next_arc[node] += 1

    def _rise(self, node: int) -> None:
        old = self.height[node]
        lowest = min(
            self.height[self.heads[index]] for index in self.leaving[node] if self.residual[index]
        )
        self._move(node, lowest + 1)
        if self.at_height[old] == 0 and old < self.count:
            # Gap rule: this level is empty, so nodes above it can only push back to the source.
            for other, height in enumerate(self.height):
                if old < height < self.count and other != self.source:
                    self._move(other, self.count + 1)
                    self.next_arc[other] = 0

    def _move(self, node: int, height: int) -> None:
        self.at_height[self.height[node]] -= 1
        self.height[node] = height
        self.at_height[height] += 1
