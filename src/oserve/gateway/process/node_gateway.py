"""One gateway process of another node: found or started, called by the hub, started again."""

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from oserve.core import Clock, HatchAddress, OServeError
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_call import HubCall, HubStreams
from oserve.gateway.process.keeper import KeptProcess, NodeKeeper
from oserve.gateway.process.messages import GatewayHome, GatewayWorkerConfig
from oserve.gateway.process.states import GatewayState, GatewayStatus, status_of
from oserve.gateway.settings import GatewaySettings
from oserve.wire.hatch import HUB_SOCKET, HatchError

_log = logging.getLogger("oserve.gateway")

_LISTEN_LIMIT_S: Final = 60.0
_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
# A process that has lived so long does not count as one that fails to start.
_STABLE_S: Final = 60.0
# Beyond the process ids of any machine, so that no process beside the server has it.
_FIRST_INCARNATION: Final = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    """What every node gets: ``count`` processes, which serve without the hub for ``alone_s``.

    ``estimator``: the state of an ``OutputEstimator`` that has learned from earlier requests.
    """

    count: int
    settings: GatewaySettings
    models: tuple[str, ...]
    keys: frozenset[str]
    alone_s: float
    estimator: dict[str, Any] | None = None

    @property
    def end_s(self) -> float:
        """How long a process has to end."""
        return self.settings.shutdown_grace_s + 1.0


class NodeGateway:
    """The process ``index`` of one node.

    Its stamp with the keeper is a digest of what it serves, and its incarnation, so that the next
    server knows it again. ``begin`` and ``leave`` may be called at any time.
    """

    def __init__(
        self,
        index: int,
        keeper: NodeKeeper,
        hub: Hub,
        plan: GatewayPlan,
        clock: Clock,
        dial: Callable[[HatchAddress, str], Awaitable[HubStreams]],
    ) -> None:
        self._index = index
        self._keeper = keeper
        self._hub = hub
        self._plan = plan
        self._clock = clock
        self._dial = dial
        self._task: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._process: KeptProcess | None = None
        self._incarnation = 0
        self._state = GatewayState.STARTING
        self._reason = ""

    def status(self) -> GatewayStatus:
        """What is told of it."""
        view = self._hub.view(self._incarnation)
        return status_of(self._keeper.node, self._index, self._state, view, self._reason)

    def begin(self) -> None:
        """See that it runs."""
        busy = self._leaving is not None and not self._leaving.done()
        if not busy and (self._task is None or self._task.done()):
            self._leaving = None
            self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """Let it finish its requests, and end; it is not started again."""
        if self._leaving is None:
            self._state, self._reason = GatewayState.LEAVING, "its node is being drained"
            self._leaving = asyncio.create_task(self._end())

    async def close(self) -> None:
        """As ``leave``; returns when it has ended."""
        self.leave()
        if self._leaving is not None:
            await self._leaving

    async def _end(self) -> None:
        held = self._process or self._keeper.processes().get(process_name(self._index))
        if held is not None:
            # It reports to the last, so its call goes on.
            with contextlib.suppress(ConnectionError):
                await held.end(self._plan.end_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._hub.forget(self._incarnation)

    # -- its life -------------------------------------------------------------------------------
    async def _run(self) -> None:
        """Keep it running until its node is lost."""
        pause_s = _PAUSE_S
        self._tell(GatewayState.STARTING, "")
        while True:
            began_s = self._clock.now()
            try:
                self._process = await self._taken()
                reason = await self._served(self._process)
            except ConnectionError as error:
                self._tell(GatewayState.AWAY, str(error))
                return
            except OServeError as error:
                reason = error.message
            finally:
                self._process = None
            self._hub.forget(self._incarnation)
            if self._leaving is not None:
                return
            if (self._state, self._reason) != (GatewayState.FAILING, reason):
                _log.error("gateway %d of node %s: %s", self._index, self._keeper.node, reason)
            self._tell(GatewayState.FAILING, reason)
            lasted = self._clock.now() - began_s >= _STABLE_S
            await self._clock.sleep(pause_s)
            pause_s = _PAUSE_S if lasted else min(2.0 * pause_s, _LONGEST_PAUSE_S)

    def _tell(self, state: GatewayState, reason: str) -> None:
        if self._leaving is None:
            self._state, self._reason = state, reason

    async def _served(self, process: KeptProcess) -> str:
        """Call the process until it has ended; returns why it did."""
        call = HubCall(self._keeper.node, self._hub, self._opened, self._clock)
        calling = asyncio.create_task(call.run())
        try:
            if not await self._listens(process):
                reason = "" if process.ending else call.reason
                await process.end(0.0)
                said = await self._keeper.failure(process_name(self._index), process)
                return f"it did not begin to serve: {said}{reason and f' ({reason})'}"
            self._tell(GatewayState.SERVING, "")
            await process.wait()
            return f"it ended: {await self._keeper.failure(process_name(self._index), process)}"
        finally:
            calling.cancel()
            await asyncio.wait({calling})

    async def _listens(self, process: KeptProcess) -> bool:
        """Wait until it listens; whether it does."""
        listening = self._hub.expect(self._incarnation)
        ended = asyncio.ensure_future(process.wait())
        late = asyncio.ensure_future(self._clock.sleep(_LISTEN_LIMIT_S))
        try:
            waited: set[asyncio.Future[Any]] = {listening, ended, late}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
            return listening.done()
        finally:
            ended.cancel()
            late.cancel()

    async def _opened(self) -> HubStreams:
        hatch = self._keeper.hatch
        if hatch is None:
            raise HatchError("the node has told no hatch")
        return await self._dial(hatch, f"{folder_name(self._index)}/{HUB_SOCKET}")

    # -- its start ------------------------------------------------------------------------------
    async def _taken(self) -> KeptProcess:
        """The process that an earlier server has left, if it is as it should be; or a new one."""
        config = self._config()
        digest = hashlib.blake2b(msgspec.json.encode(config), digest_size=8).hexdigest()
        name = process_name(self._index)
        held = self._keeper.processes().get(name)
        if held is not None:
            known, _, incarnation = held.stamp.partition(" ")
            if known == digest and not held.ending and incarnation.isdecimal():
                self._known_as(int(incarnation))
                return held
            await held.end(self._plan.end_s)
        incarnation_of_new = _FIRST_INCARNATION + secrets.randbits(48)
        config = msgspec.structs.replace(
            config, incarnation=incarnation_of_new, estimator=self._plan.estimator
        )
        self._known_as(incarnation_of_new)
        return await self._keeper.start(
            name,
            [self._keeper.python, "-m", "oserve.gateway.process.worker"],
            msgspec.json.encode(config).decode(),
            grace_s=self._plan.settings.shutdown_grace_s,
            stamp=f"{digest} {incarnation_of_new}",
        )

    def _known_as(self, incarnation: int) -> None:
        if self._incarnation not in {0, incarnation}:
            # It ended while its node was away.
            self._hub.forget(self._incarnation)
        self._incarnation = incarnation

    def _config(self) -> GatewayWorkerConfig:
        keeper, plan = self._keeper, self._plan
        hatch = keeper.hatch
        return GatewayWorkerConfig(
            process=self._index,
            hub=str(keeper.folder / folder_name(self._index) / HUB_SOCKET),
            models=plan.models,
            api_keys=sorted(plan.keys),
            settings=plan.settings,
            home=GatewayHome(
                node=keeper.node,
                folder=str(keeper.folder),
                certificate="" if hatch is None else hatch.certificate,
                alone_s=plan.alone_s,
            ),
        )


def process_name(index: "int | str") -> str:
    """Its name with the keeper. Engines are held by the same one; no engine's has a colon."""
    return f"gateway:{index}"


def folder_name(index: int) -> str:
    """Its folder beside those of engines; no engine's name has a dot."""
    return f"gateway.{index}"
