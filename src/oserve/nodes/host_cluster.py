"""The nodes that a cluster file lists under ``hosts``: the way without Ray.

On each of them ``oserve node serve`` runs. What Ray's agents tell of a node, its keeper tells
here, through the hatch: versions and folders in its greeting, devices in the note of the hatch. A
node that cannot be reached is asked again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from oserve import __version__
from oserve.core import Clock, Device, HatchAddress, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.keeper_messages import MAX_LINE_BYTES, KeeperHello, event_of
from oserve.nodes.agent_messages import HATCH_PROCESS, HatchNote
from oserve.nodes.directory import ClusterNode, NodeChanged, on_node
from oserve.wire.hatch import KEEPER_NAME, fetch_certificate, fingerprint_of, open_hatch

_log = logging.getLogger("oserve.nodes")

_ANSWER_S = 5.0
_FIRST_RETRY_S = 2.0
_MAX_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """One host of a cluster file. ``certificate_sha256``: 64 hexadecimal digits."""

    name: str
    address: str
    port: int
    token_file: str
    certificate_sha256: str


class HostDirectory:
    """See ``NodeDirectory``. ``changed`` is told of each change.

    ``known``: nodes that an earlier server has reached.
    """

    def __init__(
        self,
        hosts: Sequence[HostEntry],
        *,
        changed: NodeChanged = lambda _node: None,
        known: Mapping[str, ClusterNode] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.nodes = {host.name: _before(host, known or {}) for host in hosts}
        self.silent = ""
        self._hosts = tuple(hosts)
        self._tokens: dict[str, str] = {}
        self._changed = changed
        self._clock = clock or LiveClock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ask each node once; those that do not answer are asked again in the background.

        Raises OServeError if a token cannot be read, or no node answers.
        """
        self._tokens = {host.name: read_token(host) for host in self._hosts}
        found = await asyncio.gather(*(self._ask(host) for host in self._hosts))
        if not any(found):
            first = self._hosts[0]
            raise OServeError(
                f"no host answers; {first.name}: {self.nodes[first.name].refused}",
                place="hosts",
                remedy="run oserve node serve on each host, and copy the lines that it prints",
            )
        for host, reached in zip(self._hosts, found, strict=True):
            if not reached:
                self._tasks.append(asyncio.create_task(self._retry(host)))

    async def close(self, *, end_nodes: bool) -> None:
        """Ask no more; what was started by hand is ended by hand."""
        del end_nodes
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _retry(self, host: HostEntry) -> None:
        wait_s = _FIRST_RETRY_S
        while True:
            await self._clock.sleep(wait_s)
            if await self._ask(host):
                return
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    async def _ask(self, host: HostEntry) -> bool:
        """Ask one node what it is; whether it can be used."""
        try:
            async with asyncio.timeout(2 * _ANSWER_S):
                node = await _asked(host, self._tokens[host.name])
        except (OSError, OServeError, UnicodeError) as error:
            # UnicodeError: of a name that no host can have, such as one with two dots in a row.
            reason = error.message if isinstance(error, OServeError) else str(error)
            node = replace(self.nodes[host.name], refused=reason or "it does not answer")
        if node != self.nodes[host.name]:
            self.nodes[host.name] = node
            if node.refused:
                _log.error("node %s cannot be used: %s", node.name, node.refused)
            else:
                _log.info("node %s is up with %d devices", node.name, len(node.devices))
            self._changed(node)
        return node.usable


async def asked_devices(hosts: Sequence[HostEntry]) -> tuple[Device, ...]:
    """The devices of the hosts that answer now. Raises OServeError if none does."""
    directory = HostDirectory(hosts)
    await directory.start()
    await directory.close(end_nodes=False)
    return tuple(device for node in directory.nodes.values() for device in node.devices)


def _before(host: HostEntry, known: Mapping[str, ClusterNode]) -> ClusterNode:
    """A host as it was known before, if it is the same."""
    node = known.get(host.name)
    if node is None or node.hatch is None:
        return ClusterNode(name=host.name)
    hatch = node.hatch
    if (hatch.host, hatch.port) != (host.address, host.port):
        return ClusterNode(name=host.name)
    same = fingerprint_of(hatch.certificate) == host.certificate_sha256
    return node if same else ClusterNode(name=host.name)


def read_token(host: HostEntry) -> str:
    """The token in a host's file. Raises OServeError if others can read it, or it is not there."""
    path = Path(host.token_file).expanduser()
    place = f"hosts: {host.name}.token_file"
    try:
        if path.stat().st_mode & 0o077:
            raise OServeError("others can read this file", place=place, remedy=f"chmod 600 {path}")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise OServeError(
            f"cannot read the token: {reason}",
            place=place,
            remedy="copy the token file that oserve node serve names, to this machine",
        ) from None
    if not token:
        raise OServeError("the file is empty", place=place, remedy="copy the token into it")
    return token


async def _asked(host: HostEntry, token: str) -> ClusterNode:
    """What a node's keeper tells. Raises OSError (HatchError) or OServeError."""
    certificate = await fetch_certificate(host.address, host.port, host.certificate_sha256)
    hatch = HatchAddress(host=host.address, port=host.port, certificate=certificate, token=token)
    reader, writer = await open_hatch(hatch, KEEPER_NAME, limit=MAX_LINE_BYTES)
    try:
        line = await reader.readline()
    finally:
        writer.transport.abort()
    return node_told(host.name, hatch, line)


def node_told(name: str, hatch: HatchAddress, greeting: bytes) -> ClusterNode:
    """A node from the greeting of its keeper. Raises OServeError if it is of no use."""
    with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
        hello = event_of(greeting)
        if isinstance(hello, KeeperHello) and hello.node.oserve == __version__:
            for entry in hello.held:
                if entry.name == HATCH_PROCESS:
                    note = msgspec.convert(entry.note, HatchNote)
                    devices = on_node(name, note.devices)
                    return ClusterNode(name=name, hatch=hatch, devices=devices, facts=hello.node)
    raise OServeError(
        f"its keeper is of another version than OServe {__version__}, or has no hatch",
        place=f"node {name}",
        remedy="install the same version on every node, and run oserve node serve there",
    )
