"""Wire: HTTP/1.1 on bare asyncio protocols, for programs that pass on bytes at little cost.

A server connection hands over whole requests; an upstream connection hands back a response as the
raw bytes of its body. Wire does not know OpenAI's API, replicas or routing.
"""

from oserve.wire.connection import ServerLimits
from oserve.wire.exchange import Exchange
from oserve.wire.framing import Dechunker, Framing, chunk, dechunk
from oserve.wire.response import ResponseHead
from oserve.wire.server import serve
from oserve.wire.upstream import Sink, UpstreamPool

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
