"""The tally of one gateway process: counts by second, sent in batches without loss.

A request is classified before its answer exists, so it counts by its type probabilities until it
ends; then the count of its arrival second is corrected to its actual type. Batches are numbered and
resent until acknowledged, so that a duplicate counts once.
"""

from collections.abc import Sequence

import msgspec

# Beyond this many unsent seconds the oldest are dropped.
_MOST_SECONDS = 7200


class Batch(msgspec.Struct, kw_only=True):
    """Counts by second (Unix time) to be added: ``arrivals[second]`` has one number per type.

    ``tokens[second]``: requests that ended in it, their prompt and their output tokens. Numbers
    may be negative where they correct earlier counts. ``until_s``: this batch and the earlier ones
    contain all counts before then.
    """

    number: int = 0
    until_s: float = 0.0
    names: tuple[str, ...] = ()
    arrivals: dict[int, list[float]] = {}
    tokens: dict[int, list[float]] = {}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to add."""
        return not self.arrivals and not self.tokens

    def shifted(self, seconds: int) -> "Batch":
        """The same counts by a clock that is so many seconds ahead."""
        if not seconds:
            return self
        return msgspec.structs.replace(
            self,
            until_s=self.until_s + seconds,
            arrivals={second + seconds: row for second, row in self.arrivals.items()},
            tokens={second + seconds: row for second, row in self.tokens.items()},
        )


class Tally:
    """Counts of one process for types of these names."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._arrivals: dict[int, list[float]] = {}
        self._tokens: dict[int, list[float]] = {}
        self._sent: Batch | None = None
        self._number = 0

    def follow(self, names: Sequence[str]) -> None:
        """Count these types from now on; unsent counts of other types are dropped."""
        if tuple(names) != self.names:
            self.names = tuple(names)
            self._arrivals = {}

    def arrived(self, at_s: float, probabilities: Sequence[float]) -> None:
        """Count the arrival of a request, by the probabilities of its types."""
        second = int(at_s)
        row = self._arrivals.get(second)
        if row is None:
            self._arrivals[second] = list(probabilities)
            if len(self._arrivals) > _MOST_SECONDS:
                del self._arrivals[next(iter(self._arrivals))]
        else:
            self._arrivals[second] = [a + p for a, p in zip(row, probabilities, strict=True)]

    def ended(
        self,
        at_s: float,
        *,
        arrival_s: float,
        probabilities: Sequence[float],
        kind: int | None,
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        """Count the end of a request that arrived at ``arrival_s``; ``None``: type unknown."""
        if (
            kind is not None
            and len(probabilities) == len(self.names)
            and probabilities[kind] != 1.0
        ):
            change = [-p for p in probabilities]
            change[kind] += 1.0
            self.arrived(arrival_s, change)
        ended = self._tokens.setdefault(int(at_s), [0.0, 0.0, 0.0])
        ended[0] += 1.0
        ended[1] += prompt_tokens
        ended[2] += output_tokens
        if len(self._tokens) > _MOST_SECONDS:
            del self._tokens[next(iter(self._tokens))]

    def take(self, now_s: float = 0.0) -> Batch:
        """The batch to send: the unacknowledged one, or else a new one with all new counts."""
        if self._sent is None:
            self._number += 1
            self._sent = Batch(
                number=self._number,
                until_s=now_s,
                names=self.names,
                arrivals=self._arrivals,
                tokens=self._tokens,
            )
            self._arrivals, self._tokens = {}, {}
        return self._sent

    def acknowledge(self, number: int) -> None:
        """Acknowledge the batch of that number."""
        if self._sent is not None and self._sent.number == number:
            self._sent = None
