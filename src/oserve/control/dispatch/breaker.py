"""Circuit breakers: a replica that fails gets no requests until its back-off has expired.

Pure; time is passed in. A replica that fails fast is always the least loaded, so without a breaker
it would attract all traffic. Closed: the replica takes requests. Open: it takes none until its
back-off expires; the back-off doubles with each failure, up to a bound. Half-open: one trial
request passes; its outcome closes the breaker or opens it again.

A longer ``Retry-After`` (RFC 9110, 10.2.3) extends the back-off, up to a bound.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Statuses that concern the caller or the server, not the request; another server may answer it.
_REFUSALS = frozenset({401, 403, 404, 405, 407, 421})
_BUSY = frozenset({408, 424, 425, 429})
_TOO_MANY = 429
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """Back-off after the n-th failure in a row: ``first_s * 2**(n-1)``, at most ``most_s``.

    ``failures``: consecutive server errors that open a breaker; a refusal opens it at once.
    ``trial_s``: a trial without outcome expires after this. ``max_retry_after_s`` bounds
    Retry-After.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    failures: int = 3
    trial_s: float = 60.0
    max_retry_after_s: float = 300.0


@dataclass(slots=True)
class _Breaker:
    failures: int = 0
    opened: int = 0
    until_s: float = 0.0
    trial_until_s: float = 0.0
    reason: str = ""


class Breakers:
    """The circuit breakers of all replicas in one gateway process, by replica name."""

    def __init__(self, policy: BreakerPolicy | None = None) -> None:
        self._policy = policy or BreakerPolicy()
        self._breakers: dict[str, _Breaker] = {}

    def follow(self, replicas: Iterable[str]) -> None:
        """Drop the breakers of other replicas. Leave out a restarted replica once to reset it."""
        kept = set(replicas)
        self._breakers = {name: item for name, item in self._breakers.items() if name in kept}

    def open(self, now_s: float) -> set[str]:
        """Replicas that get no request now if another replica can serve it."""
        return {
            name
            for name, item in self._breakers.items()
            if item.opened and max(item.until_s, item.trial_until_s) > now_s
        }

    def sent(self, replica: str, now_s: float) -> None:
        """Record that a request was sent; it is the trial if the back-off has expired."""
        item = self._breakers.get(replica)
        if item is not None and item.opened and item.until_s <= now_s:
            item.trial_until_s = now_s + self._policy.trial_s

    def failed(
        self,
        replica: str,
        now_s: float,
        reason: str,
        *,
        at_once: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        """Record a failure. ``at_once``: this one failure opens the breaker."""
        policy = self._policy
        item = self._breakers.setdefault(replica, _Breaker())
        item.failures += 1
        # Failures of requests sent before the breaker opened carry no news.
        if item.opened and item.until_s > now_s and not retry_after_s:
            return
        if item.opened or at_once or retry_after_s or item.failures >= policy.failures:
            wait_s = min(policy.most_s, policy.first_s * 2.0 ** min(item.opened, 32))
            requested_s = min(retry_after_s, policy.max_retry_after_s)
            item.opened += item.until_s <= now_s
            item.until_s = max(item.until_s, now_s + max(wait_s, requested_s))
            item.trial_until_s = 0.0
            item.reason = reason

    def next_s(self, now_s: float) -> float:
        """When the next back-off expires; infinite if no breaker is open."""
        ends = (max(item.until_s, item.trial_until_s) for item in self._breakers.values())
        return min((end_s for end_s in ends if end_s > now_s), default=math.inf)

    def served(self, replica: str) -> bool:
        """Record a success, which closes the breaker; returns whether it was open."""
        item = self._breakers.pop(replica, None)
        return item is not None and item.opened > 0

    def release(self, replica: str) -> None:
        """Record that a request left without an outcome; the next one may be the trial."""
        item = self._breakers.get(replica)
        if item is not None:
            item.trial_until_s = 0.0

    def report(self, now_s: float) -> dict[str, tuple[str, float]]:
        """Open breakers by replica: the reason, and the seconds left (0: a trial may start)."""
        return {
            name: (item.reason, max(0.0, item.until_s - now_s))
            for name, item in self._breakers.items()
            if item.opened
        }


def retryable_elsewhere(status: int, *, attached: bool) -> bool:
    """Whether another replica might serve a request that this one answered with that status.

    ``attached``: others run the server, which may lack our key or the path. OServe's own engines
    all refuse the same requests.
    """
    if status >= _SERVER_ERROR or status in _BUSY:
        return True
    return attached and status in _REFUSALS


def refuses(status: int) -> bool:
    """Whether the status predicts that the next request fails, too."""
    return status in _REFUSALS or status == _TOO_MANY


def concerns_oserve(status: int) -> bool:
    """Whether the status concerns OServe's own access, so that the client must not see it."""
    return status in _REFUSALS


def retry_after_s(value: bytes) -> float:
    """The seconds in a Retry-After header; 0 if it is a date or invalid."""
    text = value.strip()
    return float(text) if text.isdigit() and len(text) < 10 else 0.0
