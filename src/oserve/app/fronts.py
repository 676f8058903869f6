"""The gateway in this process, or in several of its own: one interface for the server."""

import asyncio
import contextlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from oserve.app.hub import Hub, Operate
from oserve.app.worker import Orders
from oserve.control.table import RoutingTable
from oserve.control.tally import Batch
from oserve.core import OServeError
from oserve.gateway.dispatch import Picture
from oserve.gateway.records import RecordStore
from oserve.gateway.server import Gateway
from oserve.gateway.settings import GatewaySettings
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.app")


class Front(Protocol):
    """Takes tables, serves clients, counts what comes.

    ``hand_over`` has a replica's running requests go on elsewhere within so many seconds.
    """

    async def listen(self) -> int: ...

    def publish(self, table: RoutingTable, picture: Picture) -> None: ...

    def hand_over(self, replica: str, within_s: float) -> None: ...

    def batches(self) -> list[Batch]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontFacts:
    """What any front must know. ``operate`` answers operators' calls.

    ``estimator`` is the state of one that has learned from earlier requests.
    """

    settings: GatewaySettings
    models: tuple[str, ...]
    keys: frozenset[str]
    run_dir: Path
    operate: Operate
    estimator: dict[str, Any] | None = None


class InlineFront:
    """The gateway in this very process; the usual case."""

    def __init__(self, facts: FrontFacts) -> None:
        settings = facts.settings
        records = RecordStore(Path(settings.records_file), max_records=settings.max_records)
        self._settings = settings
        learned = facts.estimator
        self._gateway = Gateway(
            settings,
            models=facts.models,
            api_keys=facts.keys,
            records=records,
            estimator=None if learned is None else OutputEstimator.restored(learned),
        )
        self._gateway.operate = facts.operate

    async def listen(self) -> int:
        try:
            return await self._gateway.listen()
        except OSError as error:
            raise _cannot_listen(self._settings, error.strerror or str(error)) from None

    def publish(self, table: RoutingTable, picture: Picture) -> None:
        dispatcher = self._gateway.dispatcher
        dispatcher.tell(picture)
        if table != dispatcher.table:
            dispatcher.update(table)

    def hand_over(self, replica: str, within_s: float) -> None:
        self._gateway.dispatcher.hand_over(replica, within_s)

    def batches(self) -> list[Batch]:
        tally = self._gateway.dispatcher.foresight.tally
        batch = tally.take()
        tally.acknowledge(batch.number)
        return [] if batch.empty else [batch]

    async def close(self) -> None:
        await self._gateway.close()


class ProcessFront:
    """Several gateway processes on one port; one that dies is started again."""

    def __init__(self, facts: FrontFacts) -> None:
        self._settings = facts.settings
        self._facts = facts
        self._socket = str(facts.run_dir / "hub.sock")
        self._hub = Hub(facts.operate)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._closing = False

    async def listen(self) -> int:
        await self._hub.listen(self._socket)
        for index in range(self._settings.processes):
            await self._start(index)
            self._watchers.append(asyncio.ensure_future(self._watch(index)))
        return self._settings.port

    async def _start(self, index: int) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "oserve.app.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        orders = Orders(
            process=index,
            hub=self._socket,
            models=self._facts.models,
            api_keys=sorted(self._facts.keys),
            settings=self._settings,
            estimator=self._facts.estimator,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(orders) + b"\n")
        self._processes[index] = process
        line = await process.stdout.readline()
        if line.strip() != b"listening":
            await process.wait()
            raise _cannot_listen(self._settings, "its process ended; see the lines above")

    async def _watch(self, index: int) -> None:
        while not self._closing:
            await self._processes[index].wait()
            self._hub.forget(index)
            if self._closing:
                return
            _log.error("gateway process %d ended; starting it again", index)
            await asyncio.sleep(1.0)
            with contextlib.suppress(OServeError):
                await self._start(index)

    def publish(self, table: RoutingTable, picture: Picture) -> None:
        self._hub.publish(table, picture)

    def hand_over(self, replica: str, within_s: float) -> None:
        self._hub.hand_over(replica, within_s)

    def batches(self) -> list[Batch]:
        return self._hub.batches()

    async def close(self) -> None:
        self._closing = True
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(process.wait() for process in self._processes.values()))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._hub.close()


def _cannot_listen(settings: GatewaySettings, reason: str) -> OServeError:
    return OServeError(
        f"cannot listen on {settings.host}:{settings.port}: {reason}",
        place="gateway.port",
        remedy="choose another --port, or end what uses this one",
    )


def make_front(facts: FrontFacts) -> Front:
    """The front that the settings ask for."""
    if facts.settings.processes == 1:
        return InlineFront(facts)
    if facts.settings.port == 0:
        raise OServeError(
            "several gateway processes need a fixed port",
            place="gateway.port",
            remedy="name a port, or use one process",
        )
    return ProcessFront(facts)
