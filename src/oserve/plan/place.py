"""Placement: from counts of shapes to replicas on devices, moving as few weights as possible.

Replicas of the current plan with a wanted shape stay in place. If the rest would then not fit, as
few of them as possible move. The other replicas are placed first-fit descending by group size,
which always succeeds (see ``packing``), each time the replica and node with most weights already in
place. Devices that no replica of the current plan holds come first, though: a replica there starts
before another one leaves, so that capacity never falls. New replicas then change places where that
leaves fewer types without a replica once a node is lost (see ``spread``). Placement ignores KV
caches, requests and links.
"""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import combinations, count, islice

import numpy as np

from oserve.core import (
    Backend,
    DeploymentPlan,
    Device,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)
from oserve.plan.packing import ANY_KIND, is_chain, node_groups
from oserve.plan.shard import Shard, shards_held, shards_of
from oserve.plan.spread import TypesServed, spread_out

# The most choices of replicas to release that are tried: per number of replicas, and in all, in
# choices times nodes.
_MOST_RELEASES = 2000
_MOST_WORK = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Replicas on devices, grouped by shape.

    ``moved_fraction`` sums the weights that devices must receive, in copies of the whole model.
    """

    replicas: tuple[ReplicaSpec, ...]
    moved_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """Devices for one replica, in rank order, and the share of its weights that they hold.

    ``vacant``: no replica of the current plan is on them.
    """

    devices: tuple[str, ...]
    held: float
    vacant: bool = False

    @property
    def worth(self) -> tuple[bool, float]:
        """The best seat has the largest."""
        return self.vacant, round(self.held, 9)


def place_replicas(
    wanted: Sequence[tuple[ReplicaShape, int]],
    devices: Sequence[Device],
    *,
    current: DeploymentPlan | None = None,
    tensor_parallel_across_nodes: bool = False,
    backend: Backend | None = None,
    serving: TypesServed | None = None,
) -> Placement:
    """Place ``wanted`` (shape, number of replicas) on the devices.

    Each replica's devices are listed stage by stage, in the order of tensor-parallel ranks. New
    replicas run on ``backend`` and get ids unused in the current plan. ``serving``: the types that
    a shape can serve (default: every shape serves all). Raises OServeError if they do not fit.
    """
    board = _Board(devices, current, across=tensor_parallel_across_nodes)
    kept = _kept(wanted, board, current)
    left = Counter({shape: number for shape, number in wanted if number})
    for spec in kept:
        board.take(spec.devices)
        left[spec.shape] -= 1
    placed = [*kept]
    used = {spec.id for spec in current.replicas} if current else set()
    ids = (name for name in (f"r{number}" for number in count()) if name not in used)
    new: set[str] = set()
    for shape, seat in _seated(left, board):
        spec = ReplicaSpec(
            id=next(ids), shape=shape, devices=seat.devices, backend=backend or VllmBackend()
        )
        placed.append(spec)
        new.add(spec.id)
    placed = list(spread_out(placed, new, devices, serving or _all, board.occupied))
    moved = sum(1.0 - board.share_held(spec) for spec in placed if spec.id in new)
    order = {shape: index for index, (shape, _) in enumerate(wanted)}
    placed.sort(key=lambda spec: order[spec.shape])
    # Rounding must not give an unchanged plan a moved fraction.
    return Placement(replicas=tuple(placed), moved_fraction=moved if moved > 1e-9 else 0.0)


def _all(_shape: ReplicaShape) -> Set[str]:
    return {"all"}


class _Board:
    """The free devices of each node, and the weights that devices hold now."""

    def __init__(
        self, devices: Sequence[Device], current: DeploymentPlan | None, *, across: bool
    ) -> None:
        self.kinds = sorted({device.kind for device in devices})
        self.known = {device.id for device in devices}
        self.held = shards_held(current)
        replicas = current.replicas if current else ()
        self.occupied = {device for spec in replicas for device in spec.devices}
        self.free: dict[str, dict[str, list[str]]] = {kind: {} for kind in self.kinds}
        self._home: dict[str, list[str]] = {}
        self._order = {device.id: index for index, device in enumerate(devices)}
        self.node_of = {device.id: device.node for device in devices}
        for device in devices:
            node = self.free[device.kind].setdefault("" if across else device.node, [])
            node.append(device.id)
            self._home[device.id] = node

    def share_held(self, spec: ReplicaSpec) -> float:
        """The share of a replica's weights that its devices hold now."""
        pairs = zip(shards_of(spec.shape), spec.devices, strict=True)
        return sum(shard.overlap(self.held[name]) for shard, name in pairs if name in self.held)

    def kind_of(self, shape: ReplicaShape) -> str:
        return self.kinds[0] if shape.device_kind == ANY_KIND else shape.device_kind

    def take(self, devices: Sequence[str]) -> None:
        for device in devices:
            self._home[device].remove(device)

    def give(self, devices: Sequence[str]) -> None:
        for device in devices:
            self._home[device].append(device)
            self._home[device].sort(key=self._order.__getitem__)

    def holds(self, left: Counter[ReplicaShape]) -> bool:
        """Whether these replicas fit on the free devices."""
        return all(self.quotas(left, kind) is not None for kind in self.kinds)

    def quotas(self, left: Counter[ReplicaShape], kind: str) -> dict[str, Counter[int]] | None:
        """A placement of these replicas' groups on the nodes of a kind, if there is one."""
        groups: Counter[int] = Counter()
        for shape, number in left.items():
            if self.kind_of(shape) == kind:
                groups[shape.tensor_parallel_size] += number * shape.pipeline_parallel_size
        return node_groups(groups, {node: len(ids) for node, ids in self.free[kind].items()})


def _kept(
    wanted: Sequence[tuple[ReplicaShape, int]], board: _Board, current: DeploymentPlan | None
) -> list[ReplicaSpec]:
    """The current replicas that stay: as many as are wanted and fit beside the rest."""
    left = Counter({shape: number for shape, number in wanted if number})
    unknown = [shape for shape in left if board.kind_of(shape) not in board.free]
    if unknown or not board.holds(left):
        raise OServeError(
            "the replicas do not fit on the devices",
            place="plan.replicas",
            remedy="ask for fewer or smaller replicas",
        )
    alike = [
        spec
        for spec in (current.replicas if current else ())
        if spec.devices and board.known.issuperset(spec.devices) and left[spec.shape] > 0
    ]
    # If some must move, those that share a node with many stay, so that whole nodes become free.
    company = Counter(board.node_of[device] for spec in alike for device in spec.devices)
    alike.sort(key=lambda spec: _by_company(board.node_of[spec.devices[0]], company))
    stay = []
    for spec in alike:
        if left[spec.shape] > 0:
            stay.append(spec)
            left[spec.shape] -= 1
    for spec in stay:
        board.take(spec.devices)
    released: tuple[ReplicaSpec, ...] = ()
    if not board.holds(left):
        released = _released(stay, left, board)
    for spec in stay:
        if spec not in released:
            board.give(spec.devices)
    return [spec for spec in stay if spec not in released]


def _by_company(node: str, company: Counter[str]) -> tuple[int, str]:
    return -company[node], node


def _released(
    stay: Sequence[ReplicaSpec], left: Counter[ReplicaShape], board: _Board
) -> tuple[ReplicaSpec, ...]:
    """The fewest of ``stay`` that must move; frees their devices on the board.

    Tries all choices of one, of two and so on, up to a limit for each number. Beyond a limit for
    all, as on large clusters, it releases those with the least company first, and then keeps each
    that need not have moved.
    """
    work = len({node for nodes in board.free.values() for node in nodes})
    tries = iter(range(max(1, _MOST_WORK // max(1, work))))
    for number in range(1, len(stay)):
        for choice in islice(combinations(stay, number), _MOST_RELEASES):
            if next(tries, None) is None:
                return _released_in_turn(stay, left, board)
            for spec in choice:
                board.give(spec.devices)
            if board.holds(left + Counter(spec.shape for spec in choice)):
                return choice
            for spec in choice:
                board.take(spec.devices)
    for spec in stay:
        board.give(spec.devices)
    return tuple(stay)


def _released_in_turn(
    stay: Sequence[ReplicaSpec], left: Counter[ReplicaShape], board: _Board
) -> tuple[ReplicaSpec, ...]:
    """See ``_released``; it asks at most twice for each replica whether the rest fits."""
    released: list[ReplicaSpec] = []
    wanted = Counter(left)
    for spec in reversed(stay):
        board.give(spec.devices)
        released.append(spec)
        wanted[spec.shape] += 1
        if board.holds(wanted):
            break
    for spec in list(released):
        board.take(spec.devices)
        wanted[spec.shape] -= 1
        if board.holds(wanted):
            released.remove(spec)
        else:
            board.give(spec.devices)
            wanted[spec.shape] += 1
    return tuple(released)


def _seated(left: Counter[ReplicaShape], board: _Board) -> list[tuple[ReplicaShape, _Seat]]:
    """Seats for all remaining replicas, widest groups first, most weights in place first."""
    seated = []
    left = +left
    for kind in board.kinds:
        shapes = [shape for shape in left if board.kind_of(shape) == kind]
        widths = sorted({shape.tensor_parallel_size for shape in shapes}, reverse=True)
        # Widths that form no chain may fit in few ways only, so it follows one of those.
        quotas = None if is_chain(widths[::-1]) else board.quotas(left, kind)
        for width in widths:
            same = [shape for shape in shapes if shape.tensor_parallel_size == width]
            seats = _Seats(board, kind, width, quotas)
            while any(left[shape] for shape in same):
                options = [
                    (seats.best(shape), -place) for place, shape in enumerate(same) if left[shape]
                ]
                # Of equals the longest, which finds nodes with room for equal shares while some
                # are free.
                seat, place = max(
                    options, key=lambda option: (option[0].worth, len(option[0].devices), option[1])
                )
                shape = same[-place]
                seats.take(seat)
                left[shape] -= 1
                seated.append((shape, seat))
    return seated


class _Seats:
    """The best devices for replicas of one kind and width; caches results until they are taken."""

    def __init__(
        self, board: _Board, kind: str, width: int, quotas: dict[str, Counter[int]] | None
    ) -> None:
        self._board = board
        self._free = board.free[kind]
        self._width = width
        self._quotas = quotas
        self._found: dict[tuple[tuple[Shard, ...], str], _Seat] = {}

    def best(self, shape: ReplicaShape) -> _Seat:
        """All stages on one node if one has room, else equally many on as few nodes as possible.

        If nodes have no room for equal numbers, each stage is where most of it is held; vLLM does
        not run such a replica.
        """
        shards = shards_of(shape)
        whole = self._best(shards, frozenset())
        if whole is not None:
            return whole
        stages = shape.pipeline_parallel_size
        for each in range(stages // 2, 0, -1):
            dealt = self._dealt(shards, each * self._width) if stages % each == 0 else None
            if dealt is not None:
                return dealt
        devices: tuple[str, ...] = ()
        held = 0.0
        vacant = True
        for start in range(0, len(shards), self._width):
            stage = self._best(shards[start : start + self._width], frozenset(devices))
            assert stage is not None  # Packing has shown that every group has a node.
            devices += stage.devices
            held += stage.held
            vacant = vacant and stage.vacant
        return _Seat(devices=devices, held=held, vacant=vacant)

    def _dealt(self, shards: tuple[Shard, ...], share: int) -> _Seat | None:
        """So many consecutive ranks on each of several nodes; ``None`` if too few have room."""
        devices: tuple[str, ...] = ()
        held = 0.0
        vacant = True
        used: frozenset[str] = frozenset()
        for start in range(0, len(shards), share):
            part = self._best(shards[start : start + share], frozenset(), used)
            if part is None:
                return None
            devices += part.devices
            held += part.held
            vacant = vacant and part.vacant
            used |= {node for node, ids in self._free.items() if part.devices[0] in ids}
        return _Seat(devices=devices, held=held, vacant=vacant)

    def take(self, seat: _Seat) -> None:
        """Take the seat and invalidate the cached results on its nodes."""
        taken = set(seat.devices)
        for node, free in self._free.items():
            groups = len(taken.intersection(free)) // self._width
            if groups:
                if self._quotas is not None:
                    self._quotas[node][self._width] -= groups
                self._found = {key: old for key, old in self._found.items() if key[1] != node}
        self._board.take(seat.devices)

    def _best(
        self,
        shards: tuple[Shard, ...],
        without: frozenset[str],
        nodes_without: frozenset[str] = frozenset(),
    ) -> _Seat | None:
        """The best seat of all nodes; of equals the one on the node with the least room."""
        best: tuple[tuple[bool, float], int] | None = None
        seat = None
        for node, ids in self._free.items():
            if node in nodes_without:
                continue
            free = [device for device in ids if device not in without] if without else ids
            if not self._room(node, len(free), len(ids) - len(free), len(shards)):
                continue
            found = self._on_node(shards, node, free, fresh=bool(without))
            value = (found.worth, -len(free))
            if best is None or value > best:
                best, seat = value, found
        return seat

    def _room(self, node: str, free: int, reserved: int, wanted: int) -> bool:
        if self._quotas is None:
            return free >= wanted
        left = self._quotas[node][self._width] * self._width
        return left - reserved >= wanted

    def _on_node(
        self, shards: tuple[Shard, ...], node: str, free: list[str], *, fresh: bool
    ) -> _Seat:
        key = (shards, node)
        if not fresh and key in self._found:
            return self._found[key]
        held, occupied = self._board.held, self._board.occupied
        vacant = [device for device in free if device not in occupied]
        if len(vacant) >= len(shards):
            free = vacant
        overlap = np.array(
            [
                [shard.overlap(held[device]) if device in held else 0.0 for device in free]
                for shard in shards
            ]
        )
        if overlap.any():
            # Importing SciPy takes longer than most commands that import this module.
            from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

            _, columns = linear_sum_assignment(overlap, maximize=True)
        else:
            columns = np.arange(len(shards))
        seat = _Seat(
            devices=tuple(free[column] for column in columns),
            held=float(sum(overlap[rank, column] for rank, column in enumerate(columns))),
            vacant=len(vacant) >= len(shards),
        )
        if not fresh:
            self._found[key] = seat
        return seat
