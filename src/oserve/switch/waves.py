"""The order of a switch: waves of replicas that change together.

In a wave, some old replicas may have to make room first. Then new replicas start beside what still
runs, receive their weights, and are committed together. Then the old replicas on their devices
drain. So an old replica counts until it makes room or until a new one on its devices is committed,
whichever comes first. Two promises hold: the replicas on a device fit its memory at every moment,
and ready capacity never falls below a floor, for each type of request. The caller gives bytes and
requests per second; the search is in ``sequence``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from oserve.core import OServeError
from oserve.switch.layout import ShardPlacement
from oserve.switch.sequence import Sequenced, best_sequence
from oserve.switch.transfer import fill_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReplica:
    """A replica as the order sees it: bytes are per device, capacity is by type of request.

    ``engine_bytes``: memory of an engine beside weights and KV cache. ``settings``: what else an
    engine cannot change while it runs, as any text.
    """

    placed: ShardPlacement
    weights_bytes: float
    kv_bytes: float
    engine_bytes: float
    capacity_rps: tuple[float, ...]
    settings: str = ""

    @property
    def id(self) -> str:
        """The replica's id."""
        return self.placed.replica

    @property
    def total_bytes(self) -> float:
        """Bytes per device while it serves or stands by."""
        return self.weights_bytes + self.kv_bytes + self.engine_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WavePolicy:
    """What must hold: the floor by type (requests/s), and each device's memory (bytes).

    ``releases_cache``: engines can free the KV cache and keep the weights, to be copied from.
    ``standby_without_cache``: a new engine allocates its cache when the released replicas on its
    devices have ended. ``quantise``: see ``plan_transfer``.
    """

    floor_rps: tuple[float, ...]
    memory_bytes: Mapping[str, float]
    releases_cache: bool = False
    standby_without_cache: bool = False
    quantise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Replica ids. ``release`` and ``stop`` happen before ``start``, ``retire`` after the commit.

    A released replica takes no requests and gives up its cache, but others copy its weights; it
    stops with those to retire. ``sources`` hold weights while the wave's transfer runs.
    ``capacity_rps`` is ready until the commit, by type.
    """

    release: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    capacity_rps: tuple[float, ...] = ()

    @property
    def leaving(self) -> frozenset[str]:
        """Old replicas that do not serve after the wave."""
        return frozenset((*self.retire, *self.release, *self.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveOrder:
    """Waves, and the share of the floor at the worst moment (1 or more: all of it).

    ``reason`` is empty if the floor is kept. ``proved``: the floor is kept, or no order keeps more
    of it. ``kept`` replicas are in both plans, on the same devices.
    """

    waves: tuple[Wave, ...]
    kept: tuple[str, ...]
    floor_share: float
    proved: bool
    reason: str = ""


def order_switch(
    old: Sequence[WaveReplica], new: Sequence[WaveReplica], policy: WavePolicy
) -> WaveOrder:
    """Return waves that lead from the old replicas to the new ones.

    A replica of both with the same layout, settings and devices stays, whatever its id. If the
    floor cannot be kept, the result is the order that keeps most of it, with the reason. Raises
    OServeError if no order is possible: a replica fits no device, or no source would remain.
    """
    stays = {one.placed.devices: one for one in old}
    pairs = {
        one.id: stays[one.placed.devices].id
        for one in new
        if one.placed.devices in stays
        and stays[one.placed.devices].placed.layout == one.placed.layout
        and stays[one.placed.devices].settings == one.settings
    }
    kept = tuple(one for one in old if one.id in pairs.values())
    goes = tuple(one for one in old if one.id not in pairs.values())
    comes = tuple(one for one in new if one.id not in pairs)
    board = _Board(kept, goes, comes, policy)
    if not comes:
        wave = Wave(retire=tuple(one.id for one in goes), capacity_rps=board.capacity(0, 0, 0))
        share = board.share(0, 0, 0) if not goes else board.share_without_old()
        waves = (wave,) if goes else ()
        return _order(waves, kept, share, proved=True)
    sequenced = best_sequence(board)
    if sequenced is None:
        raise OServeError(
            board.stuck(),
            place="switch",
            remedy="keep a replica on devices of its own, or reload the weights from disk",
        )
    return _order(_waves(board, sequenced), kept, sequenced.share, proved=sequenced.proved)


def _order(
    waves: tuple[Wave, ...], kept: Sequence[WaveReplica], share: float, *, proved: bool
) -> WaveOrder:
    reason = ""
    if share < 1.0:
        best = "the most that any order keeps" if proved else "the most that was found"
        reason = f"capacity falls to {share:.2f} of the floor, {best}"
    return WaveOrder(
        waves=waves,
        kept=tuple(one.id for one in kept),
        floor_share=share,
        proved=proved or share >= 1.0,
        reason=reason,
    )


class _Board:
    """Overlaps of replicas as bit masks; old and new replicas each count from bit 0."""

    def __init__(
        self,
        kept: Sequence[WaveReplica],
        old: Sequence[WaveReplica],
        new: Sequence[WaveReplica],
        policy: WavePolicy,
    ) -> None:
        self.kept, self.old, self.new, self.policy = kept, old, new, policy
        self.count = len(new)
        self._check_fit()
        at = {device: index for index, one in enumerate(old) for device in one.placed.devices}
        self.overlaps: list[int] = []
        self.releases: list[int] = []
        self.stops: list[int] = []
        for one in new:
            shared = {at[device] for device in one.placed.devices if device in at}
            self.overlaps.append(_mask(shared))
            crowded = {index for index in shared if not self._fits(one, old[index], whole=True)}
            stops = {
                index
                for index in crowded
                if not (policy.releases_cache and self._fits(one, old[index], whole=False))
            }
            self.stops.append(_mask(stops))
            self.releases.append(_mask(crowded - stops))
        self._fills = [self._fillers(one) for one in new]
        self._kept_rps = _sum(one.capacity_rps for one in kept)

    def share(self, started: int, starting: int, gone: int) -> float:
        """Return the least ready share of the floor before ``starting`` is committed."""
        ready = self.capacity(started, starting, gone)
        return min(
            (have / need for have, need in zip(ready, self.policy.floor_rps, strict=True) if need),
            default=inf,
        )

    def share_without_old(self) -> float:
        """Return the share with the new and the kept replicas alone."""
        return self.share((1 << self.count) - 1, 0, (1 << len(self.old)) - 1)

    def capacity(self, started: int, starting: int, gone: int) -> tuple[float, ...]:
        """Return ready requests/s by type: all old replicas but ``gone`` and those in the way."""
        out = gone
        for index in _indices(starting):
            out |= self.releases[index] | self.stops[index]
        ready = [one.capacity_rps for index, one in enumerate(self.old) if not out >> index & 1]
        ready += [self.new[index].capacity_rps for index in _indices(started)]
        return _sum((self._kept_rps, *ready), width=len(self.policy.floor_rps))

    def gone(self, started: int) -> int:
        """Return old replicas whose devices the started ones took; all, once all have started."""
        if started == (1 << self.count) - 1:
            return (1 << len(self.old)) - 1
        out = 0
        for index in _indices(started):
            out |= self.overlaps[index]
        return out

    def stopped(self, starting: int) -> int:
        """Return old replicas that must stop before these start."""
        out = 0
        for index in _indices(starting):
            out |= self.stops[index]
        return out

    def released(self, starting: int) -> int:
        """Return old replicas that must free their cache before these start."""
        out = 0
        for index in _indices(starting):
            out |= self.releases[index]
        return out & ~self.stopped(starting)

    def fills(self, started: int, starting: int) -> bool:
        """Whether each of ``starting`` has a source while their transfer runs."""
        held = self._holding(started, starting)
        return all(self._fills[index] & held for index in _indices(starting))

    def sources(self, started: int, starting: int) -> tuple[str, ...]:
        """Return replicas that hold weights then."""
        held = self._holding(started, starting)
        everyone = (*self.old, *self.new, *self.kept)
        return tuple(everyone[index].id for index in _indices(held))

    def components(self, among: int) -> list[int]:
        """Return groups of new replicas that share no old one."""
        groups: list[tuple[int, int]] = []
        for index in _indices(among):
            own, olds = 1 << index, self.overlaps[index]
            apart = []
            for group, theirs in groups:
                if theirs & olds:
                    own, olds = own | group, olds | theirs
                else:
                    apart.append((group, theirs))
            groups = [*apart, (own, olds)]
        return [group for group, _ in groups]

    def stuck(self) -> str:
        """Return why no order is possible."""
        sources = [one.placed for one in (*self.kept, *self.old)]
        for one in self.new:
            reason = fill_reason(one.placed, sources, quantise=self.policy.quantise)
            if reason:
                return f"replica {one.id} cannot be filled: {reason}"
        return "every replica would have to stop before a new one fits, and its weights with it"

    def _holding(self, started: int, starting: int) -> int:
        olds = (1 << len(self.old)) - 1
        held = olds & ~self.gone(started) & ~self.stopped(starting)
        held |= started << len(self.old)
        return held | ((1 << len(self.kept)) - 1) << (len(self.old) + self.count)

    def _fillers(self, target: WaveReplica) -> int:
        everyone = (*self.old, *self.new, *self.kept)
        return _mask(
            index
            for index, one in enumerate(everyone)
            if not fill_reason(target.placed, [one.placed], quantise=self.policy.quantise)
        )

    def _fits(self, one: WaveReplica, other: WaveReplica, *, whole: bool) -> bool:
        """Whether a new replica fits beside an old one, which serves or has freed its cache."""
        own = one.total_bytes
        if not whole and self.policy.standby_without_cache:
            own -= one.kv_bytes
        beside = other.total_bytes if whole else other.weights_bytes + other.engine_bytes
        shared = set(one.placed.devices) & set(other.placed.devices)
        room = min(self.policy.memory_bytes[device] for device in shared)
        return own + beside <= room

    def _check_fit(self) -> None:
        for one in (*self.kept, *self.old, *self.new):
            if len(one.capacity_rps) != len(self.policy.floor_rps):
                raise OServeError(
                    f"replica {one.id} has capacities for {len(one.capacity_rps)} types",
                    place="switch",
                    remedy=f"give one for each of the {len(self.policy.floor_rps)} types",
                )
        for one in self.new:
            room = min(self.policy.memory_bytes[device] for device in one.placed.devices)
            if one.total_bytes > room:
                raise OServeError(
                    f"replica {one.id} needs {one.total_bytes / 1e9:.1f} GB of a device's "
                    f"{room / 1e9:.1f} GB",
                    place="plan.replicas",
                    remedy="use a larger shape or a smaller KV cache",
                )


def _waves(board: _Board, sequenced: Sequenced) -> tuple[Wave, ...]:
    waves = []
    started = 0
    for starting in sequenced.steps:
        before = board.gone(started)
        stop = board.stopped(starting) & ~before
        release = board.released(starting) & ~before
        retire = board.gone(started | starting) & ~before & ~stop
        waves.append(
            Wave(
                release=tuple(board.old[index].id for index in _indices(release)),
                stop=tuple(board.old[index].id for index in _indices(stop)),
                start=tuple(board.new[index].id for index in _indices(starting)),
                retire=tuple(board.old[index].id for index in _indices(retire)),
                sources=board.sources(started, starting),
                capacity_rps=board.capacity(started, starting, before),
            )
        )
        started |= starting
    return tuple(waves)


def _sum(rows: Iterable[tuple[float, ...]], *, width: int = 0) -> tuple[float, ...]:
    found = [row for row in rows if row]
    return tuple(map(sum, zip(*found, strict=True))) if found else (0.0,) * width


def _mask(indices: Iterable[int]) -> int:
    mask = 0
    for index in indices:
        mask |= 1 << index
    return mask


def _indices(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]
