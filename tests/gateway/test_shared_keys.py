"""The hub sends the key file to gateways on other nodes, which are never open while keys exist."""

from pathlib import Path
from typing import cast

import msgspec
import pytest

from oserve.control.tally import Batch
from oserve.core import KeyRole, OServeError
from oserve.gateway.access.door import Door
from oserve.gateway.access.key_file import KeyStore
from oserve.gateway.http.errors import ApiError
from oserve.gateway.process.client import HubClient
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_lines import HubLine
from oserve.gateway.process.messages import HubReply, WorkerReport
from oserve.gateway.process.shared_keys import SharedKeys
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings

PEER = "192.0.2.1"


class Line:
    """The line of a process on a node to the hub; ``keys``: what each reply had of them."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.keys: list[int | None] = []

    async def ask(self, message: bytes, limit_s: float | None) -> bytes:
        del limit_s
        reply = self.hub.reply(msgspec.json.decode(message, type=WorkerReport), "a")
        self.keys.append(None if reply.keys is None else len(reply.keys.keys))
        return msgspec.json.encode(reply)


class Far:
    """A gateway on another node: its door and its client."""

    def __init__(self, hub: Hub, incarnation: int) -> None:
        self.door = Door()
        self.line = Line(hub)
        runner = RequestRunner(GatewaySettings(placement="every-node"), None)
        line = cast("HubLine", self.line)
        self.client = HubClient(line, runner, incarnation, door=self.door)

    def tenant(self, key: str) -> str:
        """Who shows this key; "" if nobody."""
        try:
            return self.door.caller(f"Bearer {key}".encode(), PEER).tenant
        except ApiError:
            return ""


async def test_keys_reach_other_nodes_and_are_never_taken_back(tmp_path: Path) -> None:
    path, now_s = tmp_path / "keys.json", [0.0]
    store = KeyStore(path)
    hub = Hub(keys=SharedKeys(path), now=lambda: now_s[0])
    far = Far(hub, 1)
    await far.client.sync()
    assert not far.door.guarded
    first, old = store.add("acme", KeyRole.USE)
    now_s[0] += 1.0
    await far.client.sync()
    await far.client.sync()
    assert (far.tenant(""), far.tenant(old)) == ("", "acme")
    # One that starts has the keys with its first reply, before its port opens.
    late = Far(hub, 2)
    await late.client.sync()
    assert (late.tenant(""), late.tenant(old)) == ("", "acme")
    assert late.door.cache_salt("acme", b"") == Door((), path).cache_salt("acme", b"")
    store.revoke(first.id)
    now_s[0] += 1.0
    await far.client.sync()
    assert (far.tenant(""), far.tenant(old)) == ("", "")
    path.unlink()
    now_s[0] += 1.0
    await far.client.sync()
    # The next server finds no file; the process keeps what it has.
    far.line.hub = Hub(keys=SharedKeys(path), now=lambda: now_s[0])
    await far.client.sync()
    assert far.door.guarded
    assert far.line.keys == [None, 1, None, 0, None, None]


def test_processes_with_the_file_get_no_keys_and_a_damaged_one_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    KeyStore(path).add("acme", KeyRole.USE)
    report = WorkerReport(
        incarnation=1, counts=Batch(), outstanding={}, metrics={}, queued=0, table=0
    )
    reply: HubReply = Hub(keys=SharedKeys(path)).reply(report)
    assert (reply.keys, reply.keys_version) == (None, "")
    path.write_text("{}")
    with pytest.raises(OServeError, match="not a key file"):
        SharedKeys(path)
