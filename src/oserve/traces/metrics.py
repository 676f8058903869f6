"""The one implementation of every latency, throughput and goodput formula.

TTFT counts from the time the request was due, so it includes queueing and any lag of the client.
TPOT = (e2e - ttft) / (output tokens - 1); ITL is one gap between chunks. Goodput counts requests
that completed and met all their SLOs; SLO attainment is their share of all requests sent.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class OutcomeStatus(StrEnum):
    """How a replayed request ended. Truncated: it broke off or has the wrong number of tokens."""

    COMPLETED = "completed"
    FAILED = "failed"
    TRUNCATED = "truncated"


class FailureKind(StrEnum):
    """Why a request failed: the client (status 4xx), the server (5xx) or the transport."""

    CLIENT_ERROR = "client_error"
    SERVER_ERROR = "server_error"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    ERROR_EVENT = "error_event"
    BAD_EVENT = "bad_event"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One replayed request.

    ``due_s`` and ``sent_s`` count from the start of the replay, ``ttft_s`` and ``e2e_s`` from
    ``due_s``. ``ttft_s`` is the time of the first token of any kind, ``first_answer_s`` that of the
    first token after the reasoning; ``None`` without reasoning or without an answer after it.
    ``tier``: the service tier that it asked for.
    """

    due_s: float
    sent_s: float
    ttft_s: float
    e2e_s: float
    itl_s: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    status: OutcomeStatus
    error: str = ""
    failure: FailureKind | None = None
    first_answer_s: float | None = None
    reasoning_tokens: int = 0
    tier: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; ``None`` for a single token."""
        return tpot_s(self.ttft_s, self.e2e_s, self.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency limits in seconds; ``None`` means no limit.

    ``tiers``: limits of each service tier, in place of these for requests that have one.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    tiers: tuple["Slo", ...] = ()

    def met_by(self, outcome: Outcome) -> bool:
        """Whether a request completed within the limits."""
        if outcome.status is not OutcomeStatus.COMPLETED:
            return False
        if self.ttft_s is not None and outcome.ttft_s > self.ttft_s:
            return False
        if self.e2e_s is not None and outcome.e2e_s > self.e2e_s:
            return False
        tpot = outcome.tpot_s
        return self.tpot_s is None or tpot is None or tpot <= self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Percentiles of a set of durations in seconds; all 0 for an empty set."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of a replay.

    Rates are per second of ``duration_s``, from the first due time to the last end. ``failures``
    counts failed requests by kind. ``first_answer_s`` is ``None`` if no request reasoned.
    """

    sent: int
    completed: int
    failed: int
    truncated: int
    failures: dict[str, int]
    duration_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    itl_s: Percentiles
    e2e_s: Percentiles
    first_answer_s: Percentiles | None
    reasoning_tokens: int
    longest_wait_s: float
    max_send_lag_s: float
    slo_attainment: float
    goodput_rps: float


def tpot_s(ttft_s: float, e2e_s: float, output_tokens: int) -> float | None:
    """Seconds per output token after the first."""
    return (e2e_s - ttft_s) / (output_tokens - 1) if output_tokens > 1 else None


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as NumPy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # Clamped: rounding may carry an interpolation past its ends.
    return min(high, max(low, low + (position - below) * (high - low)))


def percentiles(values: Iterable[float]) -> Percentiles:
    """The percentiles that reports show, with the mean and the maximum."""
    ordered = sorted(values)
    return Percentiles(
        mean=math.fsum(ordered) / len(ordered) if ordered else 0.0,
        p50=percentile(ordered, 0.50),
        p90=percentile(ordered, 0.90),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        max=ordered[-1] if ordered else 0.0,
    )


def summarise(outcomes: Sequence[Outcome], slo: Slo) -> Summary:
    """Summarise a replay. Latencies cover completed requests; all else covers every request."""
    done = [item for item in outcomes if item.status is OutcomeStatus.COMPLETED]
    start_s = min((item.due_s for item in outcomes), default=0.0)
    end_s = max((item.due_s + item.e2e_s for item in outcomes), default=0.0)
    duration_s = max(end_s - start_s, 1e-9)
    failed = [item for item in outcomes if item.status is OutcomeStatus.FAILED]
    answers = [item.first_answer_s for item in done if item.first_answer_s is not None]
    good = sum(slo.met_by(item) for item in outcomes)
    return Summary(
        sent=len(outcomes),
        completed=len(done),
        failed=len(failed),
        truncated=sum(item.status is OutcomeStatus.TRUNCATED for item in outcomes),
        failures=dict(Counter(item.failure.value for item in failed if item.failure)),
        duration_s=duration_s if outcomes else 0.0,
        requests_per_s=len(done) / duration_s,
        prompt_tokens_per_s=sum(item.prompt_tokens for item in done) / duration_s,
        output_tokens_per_s=sum(item.output_tokens for item in done) / duration_s,
        ttft_s=percentiles(item.ttft_s for item in done),
        tpot_s=percentiles(item.tpot_s for item in done if item.tpot_s is not None),
        itl_s=percentiles(gap for item in done for gap in item.itl_s),
        e2e_s=percentiles(item.e2e_s for item in done),
        first_answer_s=percentiles(answers) if answers else None,
        reasoning_tokens=sum(item.reasoning_tokens for item in done),
        longest_wait_s=max((item.ttft_s for item in done), default=0.0),
        max_send_lag_s=max((item.sent_s - item.due_s for item in outcomes), default=0.0),
        slo_attainment=good / len(outcomes) if outcomes else 0.0,
        goodput_rps=good / duration_s,
    )
