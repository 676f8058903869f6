"""How many wrong keys one source may show: a bounded memory of recent failures."""

import ipaddress
from collections import OrderedDict

_BURST = 20
_INTERVAL_S = 2.0
_MOST_SOURCES = 4096
# Who has one IPv6 address has all of its network.
_IPV6_BITS = 64


class FailureLimiter:
    """Per source, ``burst`` failures at once and one every ``interval_s`` over time.

    For each source one number is kept: when all of its failures will be forgiven. Of more than
    ``most_sources`` the longest silent ones are forgotten.
    """

    def __init__(
        self,
        *,
        burst: int = _BURST,
        interval_s: float = _INTERVAL_S,
        most_sources: int = _MOST_SOURCES,
    ) -> None:
        self._interval_s = interval_s
        self._most_s = burst * interval_s
        self._most_sources = most_sources
        self._forgiven_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._forgiven_s)

    def wait_s(self, peer: str, now_s: float) -> float:
        """Seconds for which a source may show no further key; 0: it may now."""
        until_s = self._forgiven_s.get(source_of(peer), 0.0)
        return max(0.0, until_s - self._most_s + self._interval_s - now_s)

    def failed(self, peer: str, now_s: float) -> None:
        """Count a failure."""
        source = source_of(peer)
        until_s = max(now_s, self._forgiven_s.pop(source, 0.0)) + self._interval_s
        self._forgiven_s[source] = min(until_s, now_s + self._most_s)
        if len(self._forgiven_s) > self._most_sources:
            self._forgiven_s.popitem(last=False)


def source_of(peer: str) -> str:
    """The source that a peer's address belongs to."""
    if ":" not in peer:
        return peer
    try:
        address = ipaddress.IPv6Address(peer.partition("%")[0])
    except ValueError:
        return peer
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(int(address) >> (128 - _IPV6_BITS))
