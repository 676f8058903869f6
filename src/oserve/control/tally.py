"""What one gateway process counted, second by second, and how it travels without loss.

A request is classified before its answer exists, so it counts by its type probabilities until it
ends; then the count of its arrival second is corrected to its actual type. Batches are numbered and
resent until acknowledged, so that a duplicate counts once.
"""

from collections.abc import Sequence

import msgspec

# Past so many seconds that nobody took, the oldest are given up: nobody asks for them any more.
_MOST_SECONDS = 7200


class Batch(msgspec.Struct, kw_only=True):
    """Counts by second (Unix time) to be added: ``arrivals[second]`` has one number per type.

    ``tokens[second]``: requests that ended in it, their prompt and their output tokens. Numbers
    may be negative where they correct what was sent before. ``until_s``: everything that came
    before then is in this batch or an earlier one.
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


class Tally:
    """Counts of one process for types of these names."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._arrivals: dict[int, list[float]] = {}
        self._tokens: dict[int, list[float]] = {}
        self._sent: Batch | None = None
        self._number = 0

    def follow(self, names: Sequence[str]) -> None:
        """Count these types from now on; what was counted of others and not taken is dropped."""
        if tuple(names) != self.names:
            self.names = tuple(names)
            self._arrivals = {}

    def arrived(self, at_s: float, probabilities: Sequence[float]) -> None:
        """A request came, of the types with these probabilities."""
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
        """A request that came at ``arrival_s`` ended; ``None`` where its type never showed."""
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
        """What is to be sent: the batch that is not acknowledged yet, else all that is new."""
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
        """The batch of that number has been added."""
        if self._sent is not None and self._sent.number == number:
            self._sent = None
