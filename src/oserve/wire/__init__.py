"""Wire: HTTP/1.1 on bare asyncio protocols, for whoever must pass bytes at little cost.

A server connection that hands over whole requests, and an upstream connection that hands back a
response as the raw bytes it came in. It does not know OpenAI's API, replicas or routing.
"""

from oserve.wire.connection import ServerLimits
from oserve.wire.exchange import Exchange
from oserve.wire.framing import Dechunker, Framing, chunk, dechunk
from oserve.wire.server import serve
from oserve.wire.upstream import ResponseHead, Sink, UpstreamPool

__all__ = [
    "Dechunker",
    "Exchange",
    "Framing",
    "ResponseHead",
    "ServerLimits",
    "Sink",
    "UpstreamPool",
    "chunk",
    "dechunk",
    "serve",
]
