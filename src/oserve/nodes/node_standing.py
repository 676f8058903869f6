"""How far a node is with the files of the models, and when it is looked at again. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from oserve.nodes.directory import ClusterNode
from oserve.nodes.fetch_messages import ModelHoldings

AGAIN_S: Final = 5.0
REFUSED_S: Final = 300.0
"""A node that refused, or could not be examined, may have been put right after so long."""

_MOST_DOUBLINGS = 10


@dataclass(slots=True)
class NodeStanding:
    """What is known of a node since it came up; ``holdings`` is ``None`` until it is examined.

    ``judged``: it was compared with the others. ``words``: how its own fetch is getting on; it is
    not tried before ``pause_until_s``, and if possible not from the nodes in ``failed_from``.
    ``failures``: tries in a row. ``look_at_s``: when to examine it again; ``None``: need not be.
    """

    node: ClusterNode
    holdings: Mapping[str, ModelHoldings] | None = None
    judged: bool = False
    words: str = ""
    pause_until_s: float = 0.0
    failures: int = 0
    failed_from: set[str] = field(default_factory=set)
    look_at_s: float | None = None

    def got(self, model: str, files: ModelHoldings) -> None:
        """A fetch has ended well."""
        self.words = ""
        self.failures = 0
        self.failed_from.clear()
        self.holdings = {**(self.holdings or {}), model: files}

    def failed(self, reason: str, now_s: float, *, sender: str, refused: bool) -> bool:
        """A try has failed; whether for another reason than the last. Pauses double."""
        pause_s = REFUSED_S if refused else min(REFUSED_S, AGAIN_S * 2**self.failures)
        self.pause_until_s = now_s + pause_s
        self.failures = min(self.failures + 1, _MOST_DOUBLINGS)
        if sender and not refused:
            self.failed_from.add(sender)
        words = f"it lacks the model: {reason}"
        fresh = self.words != words
        self.words = words
        return fresh

    def examined(self, holdings: Mapping[str, ModelHoldings]) -> None:
        """It told what it has."""
        self.holdings, self.look_at_s = holdings, None

    def unexamined(self, now_s: float) -> None:
        """It does not tell what it has: what it was last known to have counts.

        One that never told is used as it is: its keeper refuses what it cannot start.
        """
        self.look_at_s = now_s + REFUSED_S
        if self.holdings is None:
            self.holdings = {}

    def look_again(self, now_s: float) -> None:
        """Have it examined again later, unless that is settled."""
        if self.look_at_s is None:
            self.look_at_s = now_s + REFUSED_S

    def next_s(self, now_s: float) -> float | None:
        """When something is to be done with it, after now."""
        times = (self.pause_until_s, self.look_at_s or 0.0)
        return min((time_s for time_s in times if time_s > now_s), default=None)
