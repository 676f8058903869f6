"""The ladders that a controller has prepared, and whether it needs another.

A ladder fits while the mix of workload types, the speeds of replicas and the present deployment are
those that it was built for. Preparing one takes seconds, so they are kept: a mix that returns finds
its ladder at once.
"""

from collections import deque
from dataclasses import dataclass

from oserve.control.ladder import Ladder, Shapes
from oserve.control.load_facts import LoadRates
from oserve.perf.corrected import Speeds

# The share of the work that may belong to other types than the ladder was built for.
TOLERANCE = 0.1
# Another ladder is used instead if it fits better by this much.
_BETTER = 0.03
_MOST = 8
# The time between two preparations; one that failed is not tried again earlier.
_REST_S = 120.0
# The same while no ladder has the present deployment, since then nothing can be decided.
_SOON_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelvedLadder:
    """A ladder, with the speeds of replicas and the deployment that it was built for.

    It may lack that deployment, if that cannot be simulated.
    """

    ladder: Ladder
    speeds: Speeds
    present: Shapes = ()

    def suits(self, present: Shapes, speeds: Speeds) -> bool:
        """Whether no other ladder would know more of this deployment at these speeds."""
        known = self.present == present or self.ladder.find(present) is not None
        return known and self.speeds == speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderNeed:
    """What a ladder is to be built for; picklable. ``mix``: the share of each type."""

    mix: LoadRates
    present: Shapes
    speeds: Speeds
    burstiness: tuple[float, ...]
    work: tuple[float, ...]


class LadderShelf:
    """Holds at most eight ladders; the one that was used longest ago makes room."""

    def __init__(self) -> None:
        self._held: deque[ShelvedLadder] = deque(maxlen=_MOST)
        self._asked_s = -_REST_S

    @property
    def ladder(self) -> Ladder | None:
        """The ladder in use."""
        return self._held[-1].ladder if self._held else None

    def add(self, item: ShelvedLadder) -> None:
        """Use this ladder from now on."""
        self._held.append(item)

    def take(self, mix: LoadRates, present: Shapes, speeds: Speeds) -> Ladder | None:
        """Use the ladder that fits best; the last one if none fits.

        A ladder of other speeds tells more than one without the present deployment.
        """
        able = [item for item in self._held if item.suits(present, speeds)]
        if not able and self.ladder is not None and self.ladder.find(present) is None:
            able = [item for item in self._held if item.ladder.find(present) is not None]
        if able:
            best = min(able, key=lambda item: item.ladder.distance(mix))
            used = self._held[-1]
            gained = used.ladder.distance(mix) - best.ladder.distance(mix)
            if used not in able or gained > _BETTER:
                self._held.remove(best)
                self._held.append(best)
        return self.ladder

    def needs(self, mix: LoadRates, present: Shapes, speeds: Speeds, now_s: float) -> bool:
        """Whether another ladder should be prepared now; asked again it says so after a rest."""
        ladder = self.take(mix, present, speeds)
        fits = (
            ladder is not None
            and self._held[-1].suits(present, speeds)
            and ladder.distance(mix) <= TOLERANCE
        )
        blind = ladder is not None and ladder.find(present) is None
        if fits or now_s - self._asked_s < (_SOON_S if blind else _REST_S):
            return False
        self._asked_s = now_s
        return True
