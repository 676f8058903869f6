"""The gateway processes of a server: held by the keeper, so that they serve on without it."""

import asyncio
import contextlib
import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.core import OServeError
from oserve.engines.adoption import end
from oserve.engines.holding import HeldEngines, HeldProcess
from oserve.engines.logs import open_log, telling_line
from oserve.gateway.process.hub import Hub, Operate
from oserve.gateway.process.worker import WorkerConfig
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot

_log = logging.getLogger("oserve.app")

# Importing takes a second or two, on a busy machine more.
_LISTEN_LIMIT_S = 60.0
_REJOIN_LIMIT_S = 10.0
_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontFacts:
    """What gateway processes must know, and who holds them. ``operate`` answers operators' calls.

    ``estimator`` is the state of one that has learned from earlier requests. ``run_dir`` is for
    the hub's socket, ``log_dir`` for a log of each.
    """

    settings: GatewaySettings
    models: tuple[str, ...]
    keys: frozenset[str]
    keeper: HeldEngines
    run_dir: Path
    log_dir: Path
    operate: Operate
    estimator: dict[str, Any] | None = None


class Front:
    """Takes tables, serves clients, counts what comes. A process that dies is started again."""

    def __init__(self, facts: FrontFacts) -> None:
        if facts.settings.processes > 1 and facts.settings.port == 0:
            raise OServeError(
                "several gateway processes need a fixed port",
                place="gateway.port",
                remedy="name a port, or use one process",
            )
        self._settings = facts.settings
        self._facts = facts
        self._socket = facts.run_dir / "hub.sock"
        self._hub = Hub(facts.operate)
        self._processes: dict[int, HeldProcess] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._closing = False

    async def listen(self) -> int:
        """Open the port, or find it open: a process of a server before goes on if it fits."""
        self._socket.unlink(missing_ok=True)
        await self._hub.listen(str(self._socket))
        count = self._settings.processes
        names = {_name(index) for index in range(count)}
        held = self._facts.keeper.processes()
        await self._end(process for name, process in held.items() if name not in names)
        ports = [await self._start(index) for index in range(count)]
        self._watchers = [asyncio.ensure_future(self._watch(index)) for index in range(count)]
        return ports[0]

    async def _start(self, index: int) -> int:
        """Take the process of this number up, or start it; returns its port."""
        orders = WorkerConfig(
            process=index,
            hub=str(self._socket),
            models=self._facts.models,
            api_keys=sorted(self._facts.keys),
            settings=self._settings,
        )
        stamp = hashlib.blake2b(msgspec.json.encode(orders), digest_size=8).hexdigest()
        held = self._facts.keeper.processes().get(_name(index))
        if held is not None:
            port = await self._rejoined(index, held, stamp)
            if port:
                return port
        orders = msgspec.structs.replace(orders, estimator=self._facts.estimator)
        log_path = open_log(self._facts.log_dir, f"gateway-{index}")
        process = await self._facts.keeper.hold(
            _name(index),
            [sys.executable, "-m", "oserve.gateway.process.worker"],
            msgspec.json.encode(orders).decode(),
            log_path,
            self._settings.shutdown_grace_s,
            stamp,
        )
        self._processes[index] = process
        found = await self._port_of(process, _LISTEN_LIMIT_S)
        if not found:
            await self._end([process])
            reason = telling_line(log_path) or "its process ended"
            raise _cannot_listen(self._settings, f"{reason}; see {log_path}")
        return found

    async def _rejoined(self, index: int, process: HeldProcess, stamp: str) -> int:
        """Its port; 0 where it is of other orders, or does not come: then it is ended."""
        if process.entry.note == stamp and not process.entry.ending:
            port = await self._port_of(process, _REJOIN_LIMIT_S)
            if port:
                self._processes[index] = process
                return port
        await self._end([process])
        return 0

    async def _port_of(self, process: HeldProcess, limit_s: float) -> int:
        listening = self._hub.expect(process.pid)
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait(
                {listening, ended}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            return listening.result() if listening.done() else 0
        finally:
            ended.cancel()

    async def _end(self, processes: Any) -> None:
        grace_s = self._settings.shutdown_grace_s + _AGAIN_S
        await asyncio.gather(*(end(process, grace_s=grace_s) for process in processes))

    async def _watch(self, index: int) -> None:
        while True:
            await self._processes[index].wait()
            self._hub.forget(self._processes[index].pid)
            if self._closing:
                return
            _log.error("gateway process %d ended; starting it again", index)
            await asyncio.sleep(_AGAIN_S)
            with contextlib.suppress(OServeError):
                await self._start(index)

    def publish(self, table: RoutingTable, snapshot: ClusterSnapshot) -> None:
        """Make a table and a snapshot current."""
        self._hub.publish(table, snapshot)

    def hand_over(self, replica: str, within_s: float) -> None:
        """Have a replica's running requests go on elsewhere within so many seconds."""
        self._hub.hand_over(replica, within_s)

    def batches(self) -> list[Batch]:
        """What was counted since the last call."""
        return self._hub.batches()

    @property
    def set_aside(self) -> dict[str, tuple[str, float]]:
        """Replicas that get no requests now: why, and for how many seconds more."""
        return self._hub.set_aside

    @property
    def counted_until_s(self) -> float:
        """Unix time up to which ``batches`` are complete."""
        return self._hub.counted_until_s

    async def close(self) -> None:
        """No new requests; running ones get their grace."""
        self._closing = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._end(self._processes.values())
        await self._hub.close()


def _name(index: int) -> str:
    # No engine is held under a name with a colon.
    return f"gateway:{index}"


def _cannot_listen(settings: GatewaySettings, reason: str) -> OServeError:
    return OServeError(
        f"cannot listen on {settings.host}:{settings.port}: {reason}",
        place="gateway.port",
        remedy="choose another --port, or end what uses this one",
    )
