"""The examiner of a node: ``python -m oserve.nodes.examiner``, held by the node's keeper.

It reads ``ExaminerOrders`` as one JSON line from standard input, and answers queries on a socket
behind the node's hatch, one JSON line each. It ends with its visitor, with its keeper, after its
time, or if no visitor comes.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from oserve.nodes.examination import (
    MAX_LINE_BYTES,
    ExaminerOrders,
    FactsQuery,
    LinkFacts,
    LinkQuery,
    MachineFacts,
    TimeQuery,
    TimeReply,
)
from oserve.nodes.fetch_messages import (
    QUERIES,
    FetchEnd,
    FetchQuery,
    FilesOffered,
    HoldingsQuery,
    OfferQuery,
)
from oserve.nodes.file_fetch import FileFetch
from oserve.nodes.file_offer import FileOffer
from oserve.nodes.links import measure_link
from oserve.nodes.machine import examine_machine
from oserve.nodes.model_files import cache_folder, find_folder, find_holdings

_EXAMINER_ORDERS_DECODER = msgspec.json.Decoder(ExaminerOrders)

_log = logging.getLogger("oserve.examiner")


OFFER_SOCKET: Final = "w0.sock"
"""Where an examiner offers files, in its folder: a name for which hatches relay in bulk."""

_TELL_S = 1.0
_VISITOR_S = 60.0
_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Examiner:
    """Answers one visitor; ``folder`` holds its sockets. ``cache``: of downloads."""

    def __init__(self, folder: str, cache: Path) -> None:
        self._folder = folder
        self._cache = cache
        self._offer: FileOffer | None = None

    async def serve(self, stream: _Stream) -> None:
        """Answer until the visitor leaves. Raises OSError, ``msgspec.DecodeError``."""
        reader, writer = stream
        while line := await reader.readline():
            query = QUERIES.decode(line)
            match query:
                case OfferQuery(model=model):
                    answer: Any = await asyncio.to_thread(self._offered, model)
                case FetchQuery():
                    answer = await self._fetched(query, stream)
                case HoldingsQuery(model=model):
                    answer = await asyncio.to_thread(find_holdings, model, self._cache)
                case _:
                    answer = await answered(query)
            writer.write(msgspec.json.encode(answer) + b"\n")

    def close(self) -> None:
        """Offer no more files."""
        if self._offer is not None:
            self._offer.close()

    def _offered(self, model: str) -> FilesOffered:
        found = find_folder(model, self._cache)
        if found is None:
            return FilesOffered(error="its files are not here")
        try:
            if self._offer is None:
                self._offer = FileOffer(f"{self._folder}/{OFFER_SOCKET}")
        except OSError as error:
            return FilesOffered(error=f"this node cannot offer files: {error.strerror}")
        self._offer.add(model, found)
        return FilesOffered()

    async def _fetched(self, query: FetchQuery, stream: _Stream) -> FetchEnd:
        """Fetch, and tell how far that is; ends with the visitor."""
        reader, writer = stream
        fetch = FileFetch(query, cache=self._cache)
        running = asyncio.ensure_future(asyncio.to_thread(fetch.run))
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=_TELL_S)
                if reader.at_eof():
                    raise ConnectionError
                writer.write(msgspec.json.encode(fetch.progress) + b"\n")
                await writer.drain()
        finally:
            fetch.stop()
        return await running


async def answered(
    query: FactsQuery | TimeQuery | LinkQuery,
) -> MachineFacts | LinkFacts | TimeReply:
    """The answer to a query about this machine."""
    match query:
        case TimeQuery():
            return TimeReply(unix_s=time.time())
        case FactsQuery(model=model):
            return await asyncio.to_thread(examine_machine, model)
        case LinkQuery() as query:
            return await asyncio.to_thread(
                measure_link,
                query.target,
                query.address,
                bandwidth=query.bandwidth,
                limit_s=query.limit_s,
            )


async def serve_examiner(orders: ExaminerOrders, cache: Path | None = None) -> None:
    """Answer one visitor until it leaves, for at most the time of the orders.

    If none comes within a minute, its server has gone. ``cache`` is for tests.
    """
    come, over = asyncio.Event(), asyncio.Event()
    folder = os.path.dirname(orders.socket)
    examiner = Examiner(folder, cache or cache_folder())

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        come.set()
        with contextlib.suppress(OSError, ValueError):
            await examiner.serve((reader, writer))
        writer.close()
        over.set()

    os.mkdir(folder, 0o700)
    try:
        server = await asyncio.start_unix_server(visit, orders.socket, limit=MAX_LINE_BYTES)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(orders.limit_s):
                async with asyncio.timeout(_VISITOR_S):
                    await come.wait()
                await over.wait()
        server.close()
    finally:
        examiner.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO)
    try:
        orders = _EXAMINER_ORDERS_DECODER.decode(sys.stdin.buffer.readline())
    except msgspec.DecodeError as error:
        _log.error("the examiner cannot read its orders: %s", error)
        return 2
    os.nice(orders.nice)
    # Its folder is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(serve_examiner(orders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
