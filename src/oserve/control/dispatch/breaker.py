"""Circuit breakers: a replica that fails at once is set aside, and tried again after a back-off.

Pure; time is passed in. A replica that answers with errors at once is always the least loaded, so
without this it would draw all traffic. Closed: it takes requests. Open: it takes none before its
back-off is over, which doubles from failure to failure up to a bound. Half-open: one request is let
through as a trial; its outcome closes the breaker or opens it again.

``Retry-After`` (RFC 9110, 10.2.3) is honoured where it asks for longer, up to a bound.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# What a server says of whoever asks, not of what is asked; another may answer it.
_REFUSALS = frozenset({401, 403, 404, 405, 407, 421})
_BUSY = frozenset({408, 424, 425, 429})
_TOO_MANY = 429
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """Back-off after the n-th failure in a row: ``first_s * 2**(n-1)``, at most ``most_s``.

    ``failures``: so many errors of the server in a row open a breaker; a refusal does at once.
    ``trial_s``: a trial without outcome is given up after this. ``most_asked_s`` bounds what
    Retry-After may ask for.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    failures: int = 3
    trial_s: float = 60.0
    most_asked_s: float = 300.0


@dataclass(slots=True)
class _Breaker:
    failures: int = 0
    opened: int = 0
    until_s: float = 0.0
    trial_until_s: float = 0.0
    reason: str = ""


class Breakers:
    """Those of all replicas, as one gateway process sees them."""

    def __init__(self, policy: BreakerPolicy | None = None) -> None:
        self._policy = policy or BreakerPolicy()
        self._breakers: dict[str, _Breaker] = {}

    def follow(self, replicas: Iterable[str]) -> None:
        """Forget all but these; one that was started anew is to be left out once."""
        kept = set(replicas)
        self._breakers = {name: item for name, item in self._breakers.items() if name in kept}

    def open(self, now_s: float) -> set[str]:
        """Replicas that are not to be given a request now, if there is another."""
        return {
            name
            for name, item in self._breakers.items()
            if item.opened and max(item.until_s, item.trial_until_s) > now_s
        }

    def sent(self, replica: str, now_s: float) -> None:
        """A request goes there: the trial, if its back-off is over."""
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
        """It did not answer a request well. ``at_once``: one failure is enough to set it aside."""
        policy = self._policy
        item = self._breakers.setdefault(replica, _Breaker())
        item.failures += 1
        # Requests that were under way when it opened say nothing new.
        if item.opened and item.until_s > now_s and not retry_after_s:
            return
        if item.opened or at_once or retry_after_s or item.failures >= policy.failures:
            wait_s = min(policy.most_s, policy.first_s * 2.0 ** min(item.opened, 32))
            asked_s = min(retry_after_s, policy.most_asked_s)
            item.opened += item.until_s <= now_s
            item.until_s = max(item.until_s, now_s + max(wait_s, asked_s))
            item.trial_until_s = 0.0
            item.reason = reason

    def next_s(self, now_s: float) -> float:
        """When one that is set aside may be given a request again; infinite if none is."""
        ends = (max(item.until_s, item.trial_until_s) for item in self._breakers.values())
        return min((end_s for end_s in ends if end_s > now_s), default=math.inf)

    def served(self, replica: str) -> bool:
        """It answered a request; whether its breaker was open."""
        item = self._breakers.pop(replica, None)
        return item is not None and item.opened > 0

    def let_go(self, replica: str) -> None:
        """A request left it without an outcome; if that was the trial, another may be."""
        item = self._breakers.get(replica)
        if item is not None:
            item.trial_until_s = 0.0

    def told(self, now_s: float) -> dict[str, tuple[str, float]]:
        """For people: why each is set aside, and for how many seconds more (0: to be tried)."""
        return {
            name: (item.reason, max(0.0, item.until_s - now_s))
            for name, item in self._breakers.items()
            if item.opened
        }


def worth_elsewhere(status: int, *, attached: bool) -> bool:
    """Whether another replica might answer what this one answered with that status.

    ``attached``: it is a server of others, which may know neither our key nor the path. An engine
    of ours refuses only what each of them would refuse.
    """
    if status >= _SERVER_ERROR or status in _BUSY:
        return True
    return attached and status in _REFUSALS


def refuses(status: int) -> bool:
    """Whether the status says that the next request will not do better."""
    return status in _REFUSALS or status == _TOO_MANY


def concerns_us(status: int) -> bool:
    """Whether the status is about the one who asks, OServe, and so is not for its client."""
    return status in _REFUSALS


def retry_after_s(value: bytes) -> float:
    """Seconds that a Retry-After header asks for; 0 where it is a date or makes no sense."""
    text = value.strip()
    return float(text) if text.isdigit() and len(text) < 10 else 0.0
