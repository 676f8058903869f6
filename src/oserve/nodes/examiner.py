"""The examiner of a node: ``python -m oserve.nodes.examiner``, held by the node's keeper.

It reads ``ExaminerOrders`` as one JSON line from standard input, and answers queries on a socket
behind the node's hatch, one JSON line each. It ends with its visitor, with its keeper, or after its
time.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import time

import msgspec

from oserve.nodes.examination import (
    MAX_LINE_BYTES,
    QUERIES,
    ExaminerOrders,
    FactsQuery,
    LinkFacts,
    LinkQuery,
    MachineFacts,
    TimeQuery,
    TimeReply,
)
from oserve.nodes.links import measure_link
from oserve.nodes.machine import examine_machine

_log = logging.getLogger("oserve.examiner")


async def answered(line: bytes) -> MachineFacts | LinkFacts | TimeReply:
    """The answer to a query. Raises ``msgspec.DecodeError`` if it cannot be read."""
    match QUERIES.decode(line):
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


async def serve_examiner(orders: ExaminerOrders) -> None:
    """Answer one visitor until it leaves, for at most the time of the orders."""
    over = asyncio.Event()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                writer.write(msgspec.json.encode(await answered(line)) + b"\n")
        writer.close()
        over.set()

    folder = os.path.dirname(orders.socket)
    os.mkdir(folder, 0o700)
    try:
        server = await asyncio.start_unix_server(visit, orders.socket, limit=MAX_LINE_BYTES)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(orders.limit_s):
                await over.wait()
        server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO)
    try:
        orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=ExaminerOrders)
    except msgspec.DecodeError as error:
        _log.error("the examiner cannot read its orders: %s", error)
        return 2
    asyncio.run(serve_examiner(orders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
