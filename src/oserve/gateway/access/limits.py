"""Limits of tenants: requests and tokens a minute, and requests in flight.

A token bucket each, as large as a minute's allowance. Tokens are charged as estimated when a
request comes, and corrected when it ends. Other gateway processes' use arrives every tenth of a
second; until then a process does not know of it, so together they may exceed a limit by what the
others admit in two such intervals. The buckets take that in afterwards and may be in debt, so over
time the limit holds.
"""

import math
from collections.abc import Mapping

import msgspec

from oserve.gateway.http.errors import ApiError
from oserve.gateway.http.headers import Headers
from oserve.gateway.settings import TenancySettings, TenantSettings

_MINUTE_S = 60.0
_MOST_WAIT_S = 600
# Sums of what came in are rounded: who waited as told must be admitted.
_TINY = 1e-6
# Beyond so many tenants those are forgotten that have nothing to remember: whose buckets are full,
# and who have no request in flight. All others are kept, however many there are.
_FEW_TENANTS = 4096


class TenantLoad(msgspec.Struct, frozen=True):
    """A tenant's requests in flight, and those of them that wait."""

    inflight: int = 0
    queued: int = 0


NO_LOAD = TenantLoad()


class _Bucket:
    """An allowance that fills within a minute. ``name``: in OpenAI's headers."""

    __slots__ = ("_at_s", "_limit_header", "_names", "_per_s", "left", "limit")

    def __init__(self, name: bytes, limit: int, now_s: float) -> None:
        self.limit = limit
        # As of the last ``fill``; negative in debt.
        self.left = float(limit)
        self._per_s = limit / _MINUTE_S
        self._at_s = now_s
        self._limit_header = b"x-ratelimit-limit-" + name, b"%d" % limit
        self._names = b"x-ratelimit-remaining-" + name, b"x-ratelimit-reset-" + name

    def fill(self, now_s: float) -> float:
        """What may be used now."""
        if now_s > self._at_s:
            self.left += (now_s - self._at_s) * self._per_s
            self._at_s = now_s
            if self.left > self.limit:
                self.left = float(self.limit)
        return self.left

    def take(self, amount: float, now_s: float) -> None:
        """Use so much; negative: give back."""
        self.left = min(self.limit, self.fill(now_s) - amount)

    def wait_s(self, amount: float) -> float:
        """Seconds until so much may be used; 0: now. More than the limit waits for all of it."""
        return max(0.0, (min(amount, self.limit) - self.left) / self._per_s)

    def headers(self) -> Headers:
        """OpenAI's headers."""
        left, (remaining, reset) = self.left, self._names
        whole = b"%d" % left if left > 0.0 else b"0"
        return (
            self._limit_header,
            (remaining, whole),
            (reset, _span((self.limit - left) / self._per_s)),
        )


class _Account:
    """One tenant in this process."""

    __slots__ = ("inflight", "limits", "requests", "tokens")

    def __init__(self, limits: TenantSettings, now_s: float) -> None:
        self.limits = limits
        requests, tokens = limits.requests_per_min, limits.tokens_per_min
        self.requests = None if requests is None else _Bucket(b"requests", requests, now_s)
        self.tokens = None if tokens is None else _Bucket(b"tokens", tokens, now_s)
        self.inflight = 0

    def take_elsewhere(self, requests: float, tokens: float, now_s: float) -> None:
        """As ``take``, but at most a minute's allowance: what is longer ago is filled up again."""
        if self.requests is not None:
            self.requests.take(min(requests, self.requests.limit), now_s)
        if self.tokens is not None:
            self.tokens.take(min(tokens, self.tokens.limit), now_s)

    def idle(self, now_s: float) -> bool:
        """Whether forgetting it changes nothing."""
        buckets = (self.requests, self.tokens)
        return not self.inflight and all(
            bucket is None or bucket.fill(now_s) >= bucket.limit for bucket in buckets
        )


class TenantLimits:
    """The limits of all tenants in one gateway process."""

    def __init__(self, settings: TenancySettings) -> None:
        self._settings = settings
        self._accounts: dict[str, _Account] = {}
        # Those with requests in flight.
        self._busy: dict[str, _Account] = {}
        self._most = _FEW_TENANTS
        self._elsewhere: Mapping[str, TenantLoad] = {}
        # Since ``take_uses``: requests and tokens.
        self._new: dict[str, tuple[float, float]] = {}

    def _account(self, tenant: str, now_s: float) -> _Account:
        found = self._accounts.get(tenant)
        if found is None:
            if len(self._accounts) >= self._most:
                self._forget_idle(now_s)
            found = self._accounts[tenant] = _Account(self._settings.of(tenant), now_s)
        return found

    def __len__(self) -> int:
        return len(self._accounts)

    def _forget_idle(self, now_s: float) -> None:
        accounts = self._accounts
        self._accounts = {name: own for name, own in accounts.items() if not own.idle(now_s)}
        # So many new ones pay for the next look at all of them.
        self._most = max(_FEW_TENANTS, 2 * len(self._accounts))

    def admit(self, tenant: str, tokens: float, now_s: float) -> Headers:
        """Admit a request of about so many tokens; returns the headers of its answer.

        Raises ApiError, 429 with Retry-After, if it exceeds a limit.
        """
        account = self._account(tenant, now_s)
        most = account.limits.max_inflight
        if most is not None and account.inflight >= most - (
            self.elsewhere(tenant).inflight if self._elsewhere else 0
        ):
            raise _refused(f"requests in flight: Limit {most}", "inflight", 1.0, account, now_s)
        own, of_tokens = account.requests, account.tokens
        if own is not None and own.fill(now_s) < 1.0 - _TINY:
            raise _past(own, "requests", 1.0, account, now_s)
        if of_tokens is not None and of_tokens.fill(now_s) < min(tokens, of_tokens.limit) - _TINY:
            raise _past(of_tokens, "tokens", tokens, account, now_s)
        account.inflight += 1
        if account.inflight == 1:
            self._busy[tenant] = account
        headers: Headers = ()
        if own is not None:
            own.left -= 1.0
            headers = own.headers()
        if of_tokens is not None:
            of_tokens.left -= tokens
            headers += of_tokens.headers()
        if headers:
            self._add(tenant, 1.0, tokens)
        return headers

    def ended(self, tenant: str, estimated: float, tokens: float, now_s: float) -> None:
        """A request has ended with so many tokens."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.inflight -= 1
            if not account.inflight:
                del self._busy[tenant]
            if tokens == estimated:
                return
            if account.tokens is not None:
                account.tokens.take(tokens - estimated, now_s)
                self._add(tenant, 0.0, tokens - estimated)

    def _add(self, tenant: str, requests: float, tokens: float) -> None:
        before = self._new.get(tenant)
        if before is not None:
            requests, tokens = requests + before[0], tokens + before[1]
        self._new[tenant] = requests, tokens

    # -- other processes ------------------------------------------------------------------------
    def take_uses(self) -> dict[str, tuple[float, float]]:
        """Requests and tokens by tenant that were used here since the last call."""
        taken, self._new = self._new, {}
        return taken

    def used_elsewhere(self, uses: Mapping[str, tuple[float, float]], now_s: float) -> None:
        """Requests and tokens that were used anew in other processes."""
        for name, (requests, tokens) in uses.items():
            self._account(name, now_s).take_elsewhere(requests, tokens, now_s)

    def loads(self, queued: Mapping[str, int]) -> dict[str, TenantLoad]:
        """What tenants with a bound on it have here; ``queued``: those of them that wait."""
        return {
            name: TenantLoad(own.inflight, queued.get(name, 0))
            for name, own in self._busy.items()
            if own.limits.max_inflight is not None or own.limits.max_queued is not None
        }

    def set_elsewhere(self, loads: Mapping[str, TenantLoad]) -> None:
        """What tenants have in other processes now."""
        self._elsewhere = loads

    def elsewhere(self, tenant: str) -> TenantLoad:
        """What a tenant has in other processes, by their last reports."""
        return self._elsewhere.get(tenant, NO_LOAD)

    def document(self, tenant: str, now_s: float) -> dict[str, object]:
        """A tenant's limits and what is left of them."""
        account = self._account(tenant, now_s)
        left = {
            name: None if bucket is None else max(0, math.floor(bucket.fill(now_s)))
            for name, bucket in (("requests", account.requests), ("tokens", account.tokens))
        }
        return {
            "limits": msgspec.to_builtins(account.limits),
            "left": left,
            "inflight": account.inflight + self.elsewhere(tenant).inflight,
        }


def _span(seconds: float) -> bytes:
    """As OpenAI writes spans of time: 120ms, 3.5s, 6m0s."""
    if seconds <= 0.001:
        return b"1ms" if seconds > 0.0 else b"0ms"
    if seconds < 1.0:
        return b"%dms" % math.ceil(seconds * 1000)
    if seconds < _MINUTE_S:
        return f"{math.ceil(seconds * 10) / 10:g}s".encode()
    return b"%dm%ds" % divmod(math.ceil(seconds), 60)


def _past(bucket: _Bucket, name: str, amount: float, account: _Account, now_s: float) -> ApiError:
    used = bucket.limit - max(0, math.floor(bucket.left))
    limit = f"{name} per min: Limit {bucket.limit}, Used {used}, Requested {amount:.0f}"
    return _refused(limit, name, bucket.wait_s(amount), account, now_s)


def _refused(limit: str, name: str, wait_s: float, account: _Account, now_s: float) -> ApiError:
    """As at OpenAI, where the type names what is limited; some clients read the message."""
    headers: Headers = ()
    for bucket in (account.requests, account.tokens):
        if bucket is not None:
            bucket.fill(now_s)
            headers += bucket.headers()
    retry_s = max(1, min(_MOST_WAIT_S, math.ceil(wait_s)))
    return ApiError(
        status=429,
        message=f"Rate limit reached on {limit}. Please try again in {retry_s}s.",
        type="tokens" if name == "tokens" else "requests",
        code="rate_limit_exceeded",
        reason=f"{name}_limit_reached",
        retry_after_s=retry_s,
        headers=headers,
    )
