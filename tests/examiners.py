"""A keeper behind a hatch whose examiners run in the process of the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from hatches import LIMIT_S, RunningHatch
from oserve.engines.keeper_messages import (
    KeeperHello,
    NodeFacts,
    ProcessStart,
    ProcessStarted,
    command_of,
    encoded,
)
from oserve.nodes import examiner
from oserve.nodes.examination import ExaminerOrders


@contextlib.asynccontextmanager
async def examining_keeper(
    hatch: RunningHatch, started: list[str], cache: Path | None = None
) -> AsyncIterator[None]:
    """A keeper whose examiners run in this process; ``started`` gets their names."""
    tasks: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        facts = NodeFacts(folder=str(hatch.folder), logs=str(hatch.folder), python="python")
        writer.write(encoded(KeeperHello(identity="", pid=1, held=[], node=facts)))
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                command = command_of(line)
                if isinstance(command, ProcessStart):
                    started.append(command.name)
                    orders = msgspec.json.decode(command.first_line, type=ExaminerOrders)
                    tasks.append(asyncio.create_task(examiner.serve_examiner(orders, cache)))
                    writer.write(encoded(ProcessStarted(name=command.name, pid=1 << 30)))
        writer.close()

    server = await asyncio.start_unix_server(serve, str(hatch.folder / "keeper.sock"))
    try:
        yield
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
        assert not list(hatch.folder.glob("*-*/api.sock"))
