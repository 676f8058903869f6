"""The ladders that a controller has prepared, and whether it needs another.

A ladder fits while the mix and the bursts of workload types, the speeds of replicas and the present
deployment are those that it was built for. Preparing one takes seconds, so they are kept: a mix
that returns finds its ladder at once.
"""

from collections import deque
from dataclasses import dataclass

from oserve.control.ladder import Ladder, Shapes
from oserve.control.load_facts import LoadRates
from oserve.perf.corrected import Speeds

# The share of the work that may belong to other types than the ladder was built for.
TOLERANCE = 0.1
# The same for the relative variance of the rate, as a mean over the work.
_BURST_TOLERANCE = 0.2
# Another ladder is used instead if it fits better by this much, of the tolerance.
_BETTER = 0.3
_MOST = 8
# The time between two preparations; one that failed is not tried again earlier.
_REST_S = 120.0
# The same while no ladder has the present deployment, since then nothing can be decided, or while
# speeds differ by more than this factor from those of the ladder, which then misleads.
_SOON_S = 20.0
_FAR = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelvedLadder:
    """A ladder, with the speeds, the deployment and the burstiness by type that it was built for.

    It may lack that deployment, if that cannot be simulated. ``cluster``: see ``LadderShelf``.
    """

    ladder: Ladder
    speeds: Speeds
    present: Shapes = ()
    bursts: tuple[float, ...] = ()
    cluster: int = 0

    def suits(self, present: Shapes, speeds: Speeds) -> bool:
        """Whether no other ladder would know more of this deployment at these speeds."""
        known = self.present == present or self.ladder.find(present) is not None
        return known and self.speeds == speeds

    def distance(self, mix: LoadRates, bursts: tuple[float, ...]) -> float:
        """How far it is from that traffic: 1 is the limit of what it is used for."""
        found = self.ladder.distance(mix) / TOLERANCE
        if not bursts:
            return found
        loads = self.ladder.loads_by_type(mix)
        whole = max(sum(loads), 1e-9)
        mine = self.bursts or (0.0,) * len(bursts)
        differs = sum(
            load / whole * abs(one - other)
            for load, one, other in zip(loads, mine, bursts, strict=True)
        )
        return max(found, differs / _BURST_TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderNeed:
    """What a ladder is to be built for; picklable. ``mix``: the share of each type."""

    mix: LoadRates
    present: Shapes
    speeds: Speeds
    burstiness: tuple[float, ...]
    work: tuple[float, ...]
    cluster: int = 0


class LadderShelf:
    """Holds at most eight ladders; the one that was used longest ago makes room.

    ``cluster`` counts the clusters that ladders were needed for: more devices make another one.
    """

    def __init__(self) -> None:
        self.cluster = 0
        self._held: deque[ShelvedLadder] = deque(maxlen=_MOST)
        self._asked_s = -_REST_S

    @property
    def ladder(self) -> Ladder | None:
        """The ladder in use."""
        return self._held[-1].ladder if self._held else None

    def outdate(self) -> None:
        """The cluster is another one: a ladder of it is needed, and serves once it is there."""
        self.cluster += 1
        self._asked_s = -_REST_S

    @property
    def is_outdated(self) -> bool:
        """Whether no ladder is one of the present cluster."""
        return all(item.cluster != self.cluster for item in self._held)

    def add(self, item: ShelvedLadder) -> None:
        """Use this ladder from now on."""
        self._held.append(item)

    def take(
        self,
        mix: LoadRates,
        present: Shapes,
        speeds: Speeds,
        bursts: tuple[float, ...] = (),
    ) -> Ladder | None:
        """Use the ladder that fits best; the last one if none fits.

        A ladder of other speeds tells more than one without the present deployment.
        """
        able = [item for item in self._held if self._suits(item, present, speeds)]
        if not able and self.ladder is not None and self.ladder.find(present) is None:
            able = [item for item in self._held if item.ladder.find(present) is not None]
        if able:
            best = min(able, key=lambda item: item.distance(mix, bursts))
            used = self._held[-1]
            gained = used.distance(mix, bursts) - best.distance(mix, bursts)
            if used not in able or gained > _BETTER:
                self._held.remove(best)
                self._held.append(best)
        return self.ladder

    def needs(
        self,
        mix: LoadRates,
        present: Shapes,
        speeds: Speeds,
        now_s: float,
        bursts: tuple[float, ...] = (),
    ) -> bool:
        """Whether another ladder should be prepared now; asked again it says so after a rest."""
        ladder = self.take(mix, present, speeds, bursts)
        fits = (
            ladder is not None
            and self._suits(self._held[-1], present, speeds)
            and self._held[-1].distance(mix, bursts) <= 1.0
        )
        soon = ladder is not None and (
            self.is_outdated
            or ladder.find(present) is None
            or _differ(self._held[-1].speeds, speeds)
        )
        if fits or now_s - self._asked_s < (_SOON_S if soon else _REST_S):
            return False
        self._asked_s = now_s
        return True

    def _suits(self, item: ShelvedLadder, present: Shapes, speeds: Speeds) -> bool:
        return item.cluster == self.cluster and item.suits(present, speeds)


def _differ(one: Speeds, other: Speeds) -> bool:
    """Whether a shape is much slower or faster in one of them."""
    pairs = [(one.of_key(key), other.of_key(key)) for key in {*one.known, *other.known}]
    return any(max(a, b) > _FAR * min(a, b) for a, b in pairs)
