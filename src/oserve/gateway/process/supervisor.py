"""The gateway processes of a server. Keepers hold them, so they serve on if the server dies."""

import asyncio
import contextlib
import hashlib
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.core import Clock, OServeError
from oserve.gateway.process.hub import Hub, OperatorCallHandler
from oserve.gateway.process.keeper import KeptProcess, NodeKeeper, ProcessKeeper
from oserve.gateway.process.messages import GatewayWorkerConfig
from oserve.gateway.process.node_gateway import GatewayPlan, process_name
from oserve.gateway.process.node_gateways import NodeGateways
from oserve.gateway.process.reports import MetricSums
from oserve.gateway.process.shared_keys import SharedKeys
from oserve.gateway.process.states import GatewayState, GatewayStatus, status_of
from oserve.gateway.records import RecordSink
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot

_log = logging.getLogger("oserve.gateway")

# Importing takes a second or two, more on a busy machine.
_LISTEN_LIMIT_S = 60.0
_REJOIN_LIMIT_S = 10.0
_RESTART_DELAY_S = 1.0


class SnapshotSampler(Protocol):
    """Watches what is published; ``metrics`` returns the sums over all processes."""

    def sampled(
        self, snapshot: ClusterSnapshot, metrics: Callable[[], MetricSums]
    ) -> ClusterSnapshot: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """What gateway processes serve, and which keeper holds them.

    ``run_dir`` is for the hub's socket. ``keys_file``: where ``oserve keys`` keeps the keys.
    ``operate`` answers operators' calls. ``estimator`` is the state of an ``OutputEstimator`` that
    has learned from earlier requests. ``records`` takes the request records of other nodes;
    ``alone_s``: how long gateways there serve without the hub. ``sampler`` sees each snapshot that
    is published, and may add to it.
    """

    settings: GatewaySettings
    models: tuple[str, ...]
    keys: frozenset[str]
    keys_file: Path
    keeper: ProcessKeeper
    run_dir: Path
    operate: OperatorCallHandler
    clock: Clock
    records: RecordSink | None = None
    alone_s: float = 65.0
    estimator: dict[str, Any] | None = None
    sampler: SnapshotSampler | None = None


class GatewaySupervisor:
    """Starts gateway processes and restarts those that end; exchanges state through the hub.

    Raises OServeError for settings that contradict each other, or a key file that cannot be used.
    """

    def __init__(self, options: SupervisorOptions) -> None:
        if options.settings.processes > 1 and options.settings.port == 0:
            raise OServeError(
                "several gateway processes need a fixed port",
                place="gateway.port",
                remedy="name a port, or use one process",
            )
        self._settings = options.settings
        self._options = options
        self._keeper = options.keeper
        self._socket = options.run_dir / "hub.sock"
        everywhere = options.settings.placement == "every-node"
        # A file that cannot be used is told of here, not by a process that fails to start.
        keys = SharedKeys(options.keys_file)
        self._hub = Hub(options.operate, options.records, keys if everywhere else None)
        self._elsewhere = NodeGateways(
            self._hub,
            GatewayPlan(
                count=options.settings.processes if everywhere else 0,
                settings=options.settings,
                models=options.models,
                keys=options.keys,
                alone_s=options.alone_s,
                estimator=options.estimator,
            ),
            options.clock,
        )
        self._processes: dict[int, KeptProcess] = {}
        self._guards: list[asyncio.Task[None]] = []
        self._closing = False

    async def listen(self) -> int:
        """Start the processes, or take over those of an earlier server; returns the port.

        Raises OServeError if a process cannot listen.
        """
        self._socket.unlink(missing_ok=True)
        await self._hub.listen(str(self._socket))
        count = self._settings.processes
        names = {process_name(index) for index in range(count)}
        held = self._keeper.processes()
        await self._end(process for name, process in held.items() if name not in names)
        ports = [await self._start(index) for index in range(count)]
        self._guards = [asyncio.ensure_future(self._guard(index)) for index in range(count)]
        return ports[0]

    async def _start(self, index: int) -> int:
        """Take over the process with this index, or start one; returns its port."""
        config = GatewayWorkerConfig(
            process=index,
            hub=str(self._socket),
            models=self._options.models,
            api_keys=sorted(self._options.keys),
            keys_file=str(self._options.keys_file),
            settings=self._settings,
        )
        stamp = hashlib.blake2b(msgspec.json.encode(config), digest_size=8).hexdigest()
        name = process_name(index)
        held = self._keeper.processes().get(name)
        if held is not None:
            port = await self._rejoined(index, held, stamp)
            if port:
                return port
        config = msgspec.structs.replace(config, estimator=self._options.estimator)
        process = await self._keeper.start(
            name,
            [sys.executable, "-m", "oserve.gateway.process.worker"],
            msgspec.json.encode(config).decode(),
            grace_s=self._settings.shutdown_grace_s,
            stamp=stamp,
        )
        self._processes[index] = process
        found = await self._port_of(process, _LISTEN_LIMIT_S)
        if not found:
            await self._end([process])
            raise cannot_listen(self._settings, await self._keeper.failure(name, process))
        return found

    async def _rejoined(self, index: int, process: KeptProcess, stamp: str) -> int:
        """Its port; 0 if its configuration differs or it does not report: then it is ended."""
        if process.stamp == stamp and not process.ending:
            port = await self._port_of(process, _REJOIN_LIMIT_S)
            if port:
                self._processes[index] = process
                return port
        await self._end([process])
        return 0

    async def _port_of(self, process: KeptProcess, limit_s: float) -> int:
        listening = self._hub.expect(process.pid)
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait(
                {listening, ended}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            return listening.result() if listening.done() else 0
        finally:
            ended.cancel()

    async def _end(self, processes: Iterable[KeptProcess]) -> None:
        grace_s = self._settings.shutdown_grace_s + _RESTART_DELAY_S
        await asyncio.gather(*(process.end(grace_s) for process in processes))

    async def _guard(self, index: int) -> None:
        while True:
            await self._processes[index].wait()
            self._hub.forget(self._processes[index].pid)
            if self._closing:
                return
            _log.error("gateway process %d ended; starting it again", index)
            await asyncio.sleep(_RESTART_DELAY_S)
            with contextlib.suppress(OServeError):
                await self._start(index)

    def publish(self, table: RoutingTable, snapshot: ClusterSnapshot) -> None:
        """Send this table and snapshot to all processes."""
        if self._options.sampler is not None:
            snapshot = self._options.sampler.sampled(snapshot, self._hub.metrics)
        self._hub.publish(table, snapshot)

    def hand_over(self, replica: str, within_s: float) -> None:
        """Have all processes migrate the running requests of a replica within ``within_s``."""
        self._hub.hand_over(replica, within_s)

    def follow(self, keepers: Mapping[str, NodeKeeper], leaving: Collection[str]) -> None:
        """See ``NodeGateways.follow``."""
        self._elsewhere.follow(keepers, leaving)

    def status(self) -> list[GatewayStatus]:
        """Every gateway process, those beside the server first."""
        return [*map(self._status, sorted(self._processes)), *self._elsewhere.status()]

    def _status(self, index: int) -> GatewayStatus:
        view = self._hub.view(self._processes[index].pid)
        state = GatewayState.STARTING if view is None else GatewayState.SERVING
        return status_of("", index, state, view)

    def batches(self) -> list[Batch]:
        """Take what was counted since the last call."""
        return self._hub.batches()

    @property
    def open_breakers(self) -> dict[str, tuple[str, float]]:
        """Replicas that get no requests now: the reason, and the seconds left."""
        return self._hub.open_breakers

    @property
    def tier_outcomes(self) -> dict[str, dict[str, int]]:
        """By tier, how many requests ended in which way since the start."""
        return self._hub.tier_outcomes

    @property
    def counted_until_s(self) -> float:
        """Unix time up to which ``batches`` are complete."""
        return self._hub.counted_until_s

    async def close(self) -> None:
        """End all processes: they accept no new requests and get their grace for running ones."""
        self._closing = True
        for guard in self._guards:
            guard.cancel()
        await asyncio.gather(*self._guards, return_exceptions=True)
        await asyncio.gather(self._end(self._processes.values()), self._elsewhere.close())
        await self._hub.close()
        if self._options.records is not None:
            await asyncio.to_thread(self._options.records.close)


def cannot_listen(settings: GatewaySettings, reason: str) -> OServeError:
    """The error of a gateway process that ended before it listened."""
    return OServeError(
        f"cannot listen on {settings.host}:{settings.port}: {reason}",
        place="gateway.port",
        remedy="choose another --port or socket, or stop the program that uses this one",
    )
