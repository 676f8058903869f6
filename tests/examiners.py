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
    ProcessExited,
    ProcessSignal,
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
    tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        facts = NodeFacts(folder=str(hatch.folder), logs=str(hatch.folder), python="python")
        writer.write(encoded(KeeperHello(identity="", pid=1, held=[], node=facts)))
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                command = command_of(line)
                if isinstance(command, ProcessStart):
                    started.append(command.name)
                    orders = msgspec.json.decode(command.first_line, type=ExaminerOrders)
                    work = examiner.serve_examiner(orders, cache)
                    tasks[command.name] = asyncio.create_task(work)
                    writer.write(encoded(ProcessStarted(name=command.name, pid=1 << 30)))
                elif isinstance(command, ProcessSignal):
                    task = tasks[command.name]
                    task.cancel()
                    await asyncio.wait({task})
                    writer.write(encoded(ProcessExited(name=command.name, status=0)))
        writer.close()

    server = await asyncio.start_unix_server(serve, str(hatch.folder / "keeper.sock"))
    try:
        yield
    finally:
        server.close()
        ended = asyncio.gather(*tasks.values(), return_exceptions=True)
        for fault in await asyncio.wait_for(ended, LIMIT_S):
            assert fault is None or isinstance(fault, asyncio.CancelledError)
        assert not list(hatch.folder.glob("*-*/api.sock"))
