"""Measures the way to another node's hatch by its echo. Blocks; one thread for each link."""

import ssl
import statistics
import time
from typing import Final

from oserve.core import HatchAddress
from oserve.nodes.examination import LinkFacts
from oserve.nodes.hatch_blocking import dial_hatch
from oserve.wire.hatch import ECHO_NAME, HatchError

_TRIPS: Final = 20
_SHARE: Final = 0.2
_SMALL: Final = b"x" * 64
_BLOCK: Final = bytes(256 * 1024)


def measure_link(
    target: str, address: HatchAddress, *, bandwidth: bool, limit_s: float
) -> LinkFacts:
    """Delay and rate of the way to a hatch; takes ``limit_s`` and the time to connect."""
    try:
        with dial_hatch(address, ECHO_NAME) as tls:
            delay_s = _delay_s(tls, limit_s * _SHARE)
            rate = _bytes_per_s(tls, limit_s * (1 - _SHARE)) if bandwidth else 0.0
    except HatchError as error:
        return LinkFacts(target=target, error=str(error))
    except OSError:
        return LinkFacts(target=target, error="the connection broke while it was measured")
    return LinkFacts(target=target, round_trip_s=delay_s, bytes_per_s=rate)


def _delay_s(tls: ssl.SSLSocket, limit_s: float) -> float:
    trips: list[float] = []
    end_s = time.monotonic() + limit_s
    tls.settimeout(max(1.0, limit_s * 5))
    while len(trips) < _TRIPS and (not trips or time.monotonic() < end_s):
        before_s = time.monotonic()
        tls.sendall(_SMALL)
        left = len(_SMALL)
        while left:
            left -= len(_received(tls, left))
        trips.append(time.monotonic() - before_s)
    return statistics.median(trips)


def _bytes_per_s(tls: ssl.SSLSocket, limit_s: float) -> float:
    """Blocks go out one by one, each when the last is back: a lower bound of the rate."""
    began_s = time.monotonic()
    echoed = 0
    while time.monotonic() - began_s < limit_s:
        tls.sendall(_BLOCK)
        left = len(_BLOCK)
        while left:
            left -= len(_received(tls, left))
        echoed += len(_BLOCK)
    return echoed / (time.monotonic() - began_s)


def _received(tls: ssl.SSLSocket, most: int) -> bytes:
    data = tls.recv(min(most, len(_BLOCK)))
    if not data:
        raise ConnectionError
    return data
