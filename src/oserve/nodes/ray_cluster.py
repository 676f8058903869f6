"""The nodes of a Ray cluster, learned from the Ray helper, which is started again when it ends.

This process never loads Ray. While the helper is away the nodes stay as they were: whether a node
lives shows in the server's own connection to its keeper, and what was missed is told by the next
helper.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from oserve.core import Clock, Device, OServeError
from oserve.engines.clock import LiveClock
from oserve.nodes.agent_messages import AgentOrders
from oserve.nodes.directory import ClusterNode, NodeChanged, on_node
from oserve.nodes.ray_messages import (
    MAX_LINE_BYTES,
    NAMESPACE_PREFIX,
    HelperCommand,
    HelperEvent,
    HelperFailure,
    HelperReady,
    HelperShutdown,
    HelperStart,
    NodeFound,
    NodeLost,
    NodeRefused,
    NodesOffered,
    NodesSettled,
    RayBack,
    RaySilent,
    encoded,
    event_of,
)

_log = logging.getLogger("oserve.nodes")

HELPER = (sys.executable, "-m", "oserve.nodes.ray_helper")

_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0
_LIVED_S = 60.0
_SETTLE_S = 180.0
_END_S = 60.0


def ray_namespace(state_dir: Path) -> str:
    """The Ray namespace of the deployment that has this state folder."""
    place = f"{os.uname().nodename} {state_dir.resolve()}".encode()
    return f"{NAMESPACE_PREFIX}{hashlib.blake2b(place, digest_size=5).hexdigest()}"


def check_ray_installed() -> None:
    """Raises OServeError unless Ray can be imported here."""
    if importlib.util.find_spec("ray") is None:
        raise OServeError(
            "Ray is not installed here",
            place="--cluster",
            remedy="pip install 'oserve[ray]', on every node",
        )


async def listed_devices(
    address: str, *, command: Sequence[str] = HELPER, env: Mapping[str, str] | None = None
) -> tuple[Device, ...]:
    """What a Ray cluster offers now, by Ray's own list: nothing is started on its nodes.

    Raises OServeError.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=None if env is None else dict(env),
    )
    orders = AgentOrders(node="any", host="")
    start = HelperStart(address=address, namespace="oserve-list", orders=orders, list_only=True)
    output, _ = await process.communicate(encoded(start))
    for line in output.splitlines():
        match event_of(line):
            case NodesOffered(devices=devices) if devices:
                return devices
            case NodesOffered():
                raise OServeError(
                    "no node of the Ray cluster offers GPUs or oserve_slot",
                    place="--cluster",
                    remedy="start Ray with --num-gpus, or --resources '{\"oserve_slot\": 2}'",
                )
            case HelperFailure(reason=reason, remedy=remedy):
                raise OServeError(reason, place="--cluster", remedy=remedy)
            case _:
                pass
    raise OServeError(
        f"the Ray helper ended with status {process.returncode}",
        place="--cluster",
        remedy="see that Ray runs on this machine too (ray status)",
    )


class RayDirectory:
    """See ``NodeDirectory``. ``changed`` is told of each change.

    ``known``: nodes that an earlier server has reached; with them a head that is away is no
    reason not to start. ``command`` and ``env`` are those of the helper; ``log`` takes what it and
    Ray write.
    """

    def __init__(
        self,
        start: HelperStart,
        *,
        log: Path,
        changed: NodeChanged = lambda _node: None,
        known: Mapping[str, ClusterNode] | None = None,
        command: Sequence[str] = HELPER,
        env: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.nodes: dict[str, ClusterNode] = dict(known or {})
        self.silent = ""
        self._start = start
        self._log = log
        self._changed = changed
        self._command = tuple(command)
        self._env = env
        self._clock = clock or LiveClock()
        self._ids: dict[str, str] = {}
        self._told: set[str] = set()
        self._failure: HelperFailure | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        """Start the helper; returns when every node that lives has been found or refused.

        Raises OServeError if it cannot join the Ray cluster, and no node is known from before.
        """
        self._task = asyncio.create_task(self._keep())
        settled = asyncio.ensure_future(self._settled.wait())
        try:
            await asyncio.wait(
                {self._task, settled}, timeout=_SETTLE_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            settled.cancel()
        if not self._settled.is_set():
            failure = self._failure
            if failure is None and self.nodes:
                _log.warning("Ray has not told of all nodes yet")
                return
            await self.close(end_nodes=False)
            if failure is not None:
                raise OServeError(failure.reason, place="--cluster", remedy=failure.remedy)
            raise OServeError(
                f"the nodes of the Ray cluster were not all found within {_SETTLE_S:g} s",
                place="--cluster",
                remedy=f"see ray status, and {self._log}",
            )

    async def close(self, *, end_nodes: bool) -> None:
        """End the helper; with ``end_nodes`` also agents, keepers, and all that they hold."""
        self._closing = True
        process = self._process
        if process is not None and process.returncode is None:
            self._send(HelperShutdown(end_nodes=end_nodes))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await process.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # -- the helper -----------------------------------------------------------------------------
    async def _keep(self) -> None:
        """Run the helper, again and again; ends if it cannot start at all."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._closing:
            began_s = self._clock.now()
            self._failure = None
            status = await self._run()
            if self._closing:
                return
            failure = self._failure
            reason = failure.reason if failure else f"the Ray helper ended with status {status}"
            final = failure is not None and failure.final
            if final or not (self._settled.is_set() or self.nodes):
                self._failure = failure or _ended(reason, self._log)
                return
            # The nodes that were known before are called without Ray.
            self._settled.set()
            if self._clock.now() - began_s > _LIVED_S:
                backoff_s = _FIRST_BACKOFF_S
            self._set_silent(f"{reason}; it is started again in {backoff_s:g} s")
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _run(self) -> int:
        """One life of the helper; its status."""
        self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with self._log.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=output,
                    env=None if self._env is None else dict(self._env),
                    limit=MAX_LINE_BYTES,
                    # It must survive an interrupt from the keyboard: the server ends it.
                    start_new_session=True,
                )
        except OSError as error:
            self._failure = _ended(str(error), self._log)
            return 127
        self._process = process
        self._told.clear()
        self._send(self._start)
        assert process.stdout is not None  # A pipe for it ensures that.
        with contextlib.suppress(OSError, ValueError):
            while line := await process.stdout.readline():
                self._read(line)
        if process.returncode is None and not self._closing:
            # Its line is broken, or it wrote a line that is too long.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return await process.wait()

    def _send(self, command: HelperCommand) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(encoded(command))

    def _read(self, line: bytes) -> None:
        try:
            event = event_of(line)
        except msgspec.DecodeError as error:
            _log.error("cannot read a message of the Ray helper: %s", error)
            return
        self.handle(event)

    # -- what it tells --------------------------------------------------------------------------
    def handle(self, event: HelperEvent) -> None:
        """Take one event up."""
        match event:
            case HelperReady(ray=version):
                _log.info("joined the Ray cluster (Ray %s)", version)
                self._set_silent("")
            case NodeFound():
                self._ids[event.name] = event.id
                self._told.add(event.name)
                self._put(_found(event))
            case NodeRefused(name=name, reason=reason, remedy=remedy):
                self._ids[name] = event.id
                self._told.add(name)
                known = self.nodes.get(name, ClusterNode(name=name))
                self._put(replace(known, refused=f"{reason} ({remedy})", lost=""))
            case NodeLost(name=name, reason=reason):
                # Ray may tell the end of an earlier life after the next has begun.
                if name in self.nodes and self._ids.get(name) == event.id:
                    self._put(replace(self.nodes[name], lost=f"Ray: {reason}"))
            case NodesSettled():
                for name in self.nodes.keys() - self._told:
                    self._put(replace(self.nodes[name], lost="it has left the Ray cluster"))
                self._settled.set()
            case RaySilent(reason=reason):
                self._set_silent(reason)
            case RayBack():
                self._set_silent("")
            case NodesOffered():
                pass  # the answer to another question
            case HelperFailure():
                self._failure = event

    def _put(self, node: ClusterNode) -> None:
        before = self.nodes.get(node.name)
        if before == node:
            return
        self.nodes[node.name] = node
        match node:
            case ClusterNode(lost=reason) if reason:
                _log.error("node %s is lost: %s", node.name, reason)
            case ClusterNode(refused=reason) if reason:
                _log.error("node %s cannot be used: %s", node.name, reason)
            case _:
                _log.info("node %s is up with %d devices", node.name, len(node.devices))
        self._changed(node)

    def _set_silent(self, reason: str) -> None:
        if reason and reason != self.silent:
            _log.warning("nothing is heard of Ray; the nodes serve on: %s", reason)
        elif self.silent and not reason:
            _log.info("Ray is heard again")
        self.silent = reason


def _found(event: NodeFound) -> ClusterNode:
    report = event.report
    return ClusterNode(
        name=event.name,
        hatch=report.hatch,
        devices=on_node(event.name, report.devices),
        facts=report.facts,
        labels=event.labels,
    )


def _ended(reason: str, log: Path) -> HelperFailure:
    return HelperFailure(reason=reason, remedy=f"see {log}", final=False)
