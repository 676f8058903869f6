"""The distribution of a request's output length, learned online.

Answers fall into bins, two per doubling. Several features of a request (prompt length, token limit,
tenant, system prompt, session) each keep a histogram per value, smoothed towards the histogram of
all requests:

    p_view = (counts + SMOOTHING * p_all) / (n + SMOOTHING)

The weights of the mixture follow how well each feature predicted the answers so far (Bayes' rule
with a fixed share, so that a poor predictor can recover). Old observations decay. The estimator
holds no text, only numbers and hashes, and per feature only the most recent values.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from operator import mul
from typing import Any

import msgspec

_PER_DOUBLING = 2
BINS = 2 * 18
_SMOOTHING = 12.0
# The effective number of answers in a histogram.
_MEMORY = 2000.0
_MAX_VALUES = 4096
_LARGEST_UNIT = 1e12
# Expectations are computed anew after this share of all answers that are remembered.
_STALE = 1 / 200
_MAX_RECENT = 1024
# The fixed share that the weights return to all features after each answer; the learning rate.
_SHARED = 0.01
_RATE = 0.5


class KnownAtArrival(msgspec.Struct, frozen=True, kw_only=True):
    """The features of a request at its arrival.

    ``max_tokens`` is ``None`` if the client sets no limit; unknown features are empty.
    """

    prompt_tokens: int
    max_tokens: int | None = None
    endpoint: str = ""
    tenant: str = ""
    system: str = ""
    session: str = ""


class OutputExpectation(msgspec.Struct, frozen=True, kw_only=True):
    """The distribution of an output length.

    The probabilities of the bins (they sum to 1), and the mean output of each bin in tokens.
    """

    probabilities: tuple[float, ...]
    lengths: tuple[float, ...]

    @property
    def mean_tokens(self) -> float:
        """Expected output tokens."""
        return float(sum(map(mul, self.probabilities, self.lengths)))

    def quantile(self, chance: float) -> float:
        """The quantile of the output length at this probability, to the bin."""
        total = 0.0
        for p, tokens in zip(self.probabilities, self.lengths, strict=True):
            total += p
            if total >= chance:
                return tokens
        return self.lengths[-1]

    def beyond(self, made_tokens: int) -> float:
        """Expected output of an answer with ``made_tokens`` so far; at least one more."""
        left = [
            (p, tokens)
            for p, tokens in zip(self.probabilities, self.lengths, strict=True)
            if tokens > made_tokens
        ]
        total = sum(p for p, _ in left)
        if total <= 0.0:
            return made_tokens * math.sqrt(2.0) + 1.0
        return sum(p * tokens for p, tokens in left) / total


class _Histogram:
    """Decaying counts of answers by bin.

    Instead of all counts decaying with each answer, later answers count for more: ``counts`` and
    ``total`` are in units of ``_unit``.
    """

    __slots__ = ("_unit", "counts", "total")

    def __init__(self, counts: Sequence[float] = ()) -> None:
        self.counts = list(counts) or [0.0] * BINS
        self.total = sum(self.counts)
        self._unit = 1.0

    @property
    def answers(self) -> float:
        """The effective number of answers."""
        return self.total / self._unit

    @property
    def smoothing(self) -> float:
        """What smoothing adds, in the units of ``counts``."""
        return _SMOOTHING * self._unit

    def add(self, index: int) -> None:
        if self.total >= _MEMORY * self._unit:
            self._unit /= 1.0 - 1.0 / _MEMORY
            if self._unit > _LARGEST_UNIT:
                self._rescale()
        self.counts[index] += self._unit
        self.total += self._unit

    def _rescale(self) -> None:
        self.counts = self.answers_by_bin()
        self.total = sum(self.counts)
        self._unit = 1.0

    def answers_in(self, index: int) -> float:
        """The effective number of answers in one bin."""
        return self.counts[index] / self._unit

    def answers_by_bin(self) -> list[float]:
        """The effective number of answers in each bin."""
        return [count / self._unit for count in self.counts]

    def chance(self, index: int, base: float) -> float:
        """The probability of one bin, smoothed towards ``base``."""
        smoothing = self.smoothing
        return (self.counts[index] + smoothing * base) / (self.total + smoothing)

    def smoothed(self, base: Sequence[float]) -> list[float]:
        smoothing = self.smoothing
        whole = self.total + smoothing
        return [(n + smoothing * p) / whole for n, p in zip(self.counts, base, strict=True)]


class OutputEstimator:
    """Learns from finished requests; ``usual_tokens`` is the prior mean output."""

    def __init__(self, usual_tokens: float = 128.0) -> None:
        self._all = _Histogram()
        self._prior = _spread_around(usual_tokens)
        self._lengths = [bin_tokens(index) for index in range(BINS)]
        self._views: list[OrderedDict[Hashable, _Histogram]] = [OrderedDict() for _ in _VIEWS]
        self._weights = [1.0 / (len(_VIEWS) + 1)] * (len(_VIEWS) + 1)
        # Expectations by features and limit, until so many more answers have been learned.
        self._recent: dict[Hashable, OutputExpectation] = {}
        self._fresh_for = 0

    @property
    def seen(self) -> float:
        """The effective number of answers learned from."""
        return self._all.answers

    def expect(self, known: KnownAtArrival) -> OutputExpectation:
        """The distribution of a request's output, truncated at its token limit.

        It is that of a moment before, if fewer than ``_STALE`` of all answers came since.
        """
        key = (*(view(known) for view in _VIEWS), known.max_tokens)
        found = self._recent.get(key)
        if found is None:
            if len(self._recent) >= _MAX_RECENT:
                self._recent.clear()
            found = self._recent[key] = self._expect(known)
        return found

    def _expect(self, known: KnownAtArrival) -> OutputExpectation:
        base = self._all.smoothed(self._prior)
        seen = self._seen(known)
        rest = sum(w for w, found in zip(self._weights[1:], seen, strict=True) if found is None)
        weight = self._weights[0] + rest
        mixed = [weight * p for p in base]
        for w, found in zip(self._weights[1:], seen, strict=True):
            if found is not None:
                smoothing = found.smoothing
                own = w / (found.total + smoothing)
                mixed = [
                    p + own * (count + smoothing * q)
                    for p, count, q in zip(mixed, found.counts, base, strict=True)
                ]
        lengths = self._lengths
        limit = known.max_tokens
        if limit is not None:
            lengths = [min(tokens, float(max(1, limit))) for tokens in lengths]
        return OutputExpectation(probabilities=tuple(mixed), lengths=tuple(lengths))

    def learn(self, known: KnownAtArrival, output_tokens: int) -> None:
        """Learn from one finished request."""
        if output_tokens < 1:
            return
        index = length_bin(output_tokens)
        base = self._all.chance(index, self._prior[index])
        told = [base]
        for found in self._seen(known):
            told.append(base if found is None else found.chance(index, base))
        weights = [w * p**_RATE for w, p in zip(self._weights, told, strict=True)]
        total = sum(weights)
        even = _SHARED / len(weights)
        self._weights = [(1 - _SHARED) * w / total + even for w in weights]
        for view, values in zip(_VIEWS, self._views, strict=True):
            value = view(known)
            if value is None:
                continue
            if value not in values:
                values[value] = _Histogram()
                if len(values) > _MAX_VALUES:
                    values.popitem(last=False)
            values.move_to_end(value)
            values[value].add(index)
        self._all.add(index)
        step = max(1.0 / _MEMORY, 1.0 / (self._all.answers_in(index) + 1.0))
        self._lengths[index] += step * (output_tokens - self._lengths[index])
        self._fresh_for -= 1
        if self._fresh_for <= 0:
            self._recent.clear()
            self._fresh_for = int(_STALE * self.seen)

    def state(self) -> dict[str, Any]:
        """Plain data for ``restored``; of the features it holds only lengths."""
        by_length = self._views[0]
        return {
            "all": self._all.answers_by_bin(),
            "lengths": list(self._lengths),
            "weights": list(self._weights),
            "by_prompt": [[key, item.answers_by_bin()] for key, item in by_length.items()],
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "OutputEstimator":
        """Restore from ``state``; raises ValueError if it has another form."""
        made = cls()
        sizes = (len(state["all"]), len(state["lengths"]), len(state["weights"]))
        if sizes != (BINS, BINS, len(made._weights)):
            raise ValueError(f"histograms of {sizes}, not of {BINS} bins")
        made._all = _Histogram(state["all"])
        made._lengths = [float(value) for value in state["lengths"]]
        made._weights = [float(value) for value in state["weights"]]
        for key, counts in state["by_prompt"]:
            made._views[0][int(key)] = _Histogram(counts)
        return made

    def _seen(self, known: KnownAtArrival) -> list[_Histogram | None]:
        """The histogram of each feature's value, ``None`` for an unseen value."""
        return [
            None if (value := view(known)) is None else values.get(value)
            for view, values in zip(_VIEWS, self._views, strict=True)
        ]


def _by_prompt(known: KnownAtArrival) -> Hashable | None:
    return round(2 * math.log2(known.prompt_tokens + 1))


def _by_limit(known: KnownAtArrival) -> Hashable | None:
    limit = known.max_tokens
    return None if limit is None else (known.endpoint, round(2 * math.log2(max(1, limit))))


def _by_tenant(known: KnownAtArrival) -> Hashable | None:
    return known.tenant or None


def _by_system(known: KnownAtArrival) -> Hashable | None:
    if not known.system:
        return None
    return (known.system, round(math.log2(known.prompt_tokens + 1)))


def _by_session(known: KnownAtArrival) -> Hashable | None:
    return known.session or None


_VIEWS = (_by_prompt, _by_limit, _by_tenant, _by_system, _by_session)


def length_bin(tokens: float) -> int:
    """The bin of an answer of at least one token."""
    return min(BINS - 1, int(_PER_DOUBLING * math.log2(tokens)))


def bin_tokens(index: int) -> float:
    """The geometric middle of a bin, in tokens."""
    return float(max(1.0, 2.0 ** ((index + 0.5) / _PER_DOUBLING)))


def _spread_around(tokens: float) -> list[float]:
    """A log-normal prior with a spread of a factor of e."""
    weights = [math.exp(-0.5 * math.log(bin_tokens(index) / tokens) ** 2) for index in range(BINS)]
    total = sum(weights)
    return [weight / total for weight in weights]
