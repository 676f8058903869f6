"""Heads of requests that were read before: clients send the same bytes again and again. Pure.

Only a head whose begin and end every reader finds at the same place is kept: it begins with its
method, all lines are whole and end in CRLF, it has no transfer coding, no upgrade and no
expectation, and its connection stays open.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_MAX_HEADS = 1024
_MAX_HEAD_BYTES = 1024
# Fields that change the framing, or whose values differ from request to request.
_NOT_KEPT = frozenset(
    {
        b"expect",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"trailer",
        b"traceparent",
        b"tracestate",
        b"x-correlation-id",
        b"x-request-id",
    }
)


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A head as it was read and checked; ``length_bytes`` is that of the body."""

    method: bytes
    path: bytes
    headers: Mapping[bytes, bytes]
    length_bytes: int


class KnownHeads:
    """Bytes of a head, its empty line included, and what they mean; the oldest give way."""

    __slots__ = ("_heads", "get")

    def __init__(self) -> None:
        self._heads: dict[bytes, RequestHead] = {}
        self.get = self._heads.get

    def learn(self, raw: bytes, head: RequestHead) -> None:
        """Keep a head, if it is one that may be kept."""
        line_ends = raw.count(b"\r\n")
        # Parsers skip empty lines before a request, so that the first empty line may be no end.
        if (
            len(raw) > _MAX_HEAD_BYTES
            or not raw.startswith(head.method + b" ")
            or raw.count(b"\n") != line_ends
            or raw.count(b"\r") != line_ends
            or not _NOT_KEPT.isdisjoint(head.headers)
        ):
            return
        if len(self._heads) >= _MAX_HEADS:
            del self._heads[next(iter(self._heads))]
        self._heads[raw] = head
