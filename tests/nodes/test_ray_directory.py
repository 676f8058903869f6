"""The server's side of the Ray helper, with a helper that plays a script."""

import asyncio
import sys
from pathlib import Path

import pytest

from oserve.core import Device, HatchAddress, OServeError
from oserve.engines.keeper_messages import NodeFacts
from oserve.nodes.agent_messages import AgentOrders, NodeReport
from oserve.nodes.directory import ClusterNode
from oserve.nodes.ray_cluster import RayDirectory
from oserve.nodes.ray_messages import (
    HelperFailure,
    HelperReady,
    HelperStart,
    NodeFound,
    NodeLost,
    NodeRefused,
    NodesSettled,
    RayBack,
    RaySilent,
    encoded,
)

START = HelperStart(address="10.0.0.1:6379", namespace="n", orders=AgentOrders(node="any", host=""))
# Says its lines and waits until it is told to end, or ends by itself.
PLAYER = """
import pathlib, sys
assert b"HelperStart" in sys.stdin.buffer.readline()
lives = pathlib.Path(sys.argv[1])
number = int(lives.read_text()) if lives.exists() else 0
lives.write_text(str(number + 1))
script = sys.argv[2 + min(number, len(sys.argv) - 3)]
sys.stdout.buffer.write(pathlib.Path(script).read_bytes())
sys.stdout.flush()
if not script.endswith("dies"):
    sys.stdin.buffer.readline()
"""


def found(name: str, key: str = "1", port: int = 1) -> NodeFound:
    return NodeFound(
        name=name,
        id=key,
        address="10.0.0.1",
        resources={},
        labels={"zone": "z"},
        report=NodeReport(
            node=name,
            hatch=HatchAddress(host="10.0.0.1", port=port, certificate="", token="secret"),
            devices=(Device(id="gpu:0", kind="H100", uuid="GPU-1"),),
            facts=NodeFacts(host=name),
        ),
    )


class NoWait:
    """A clock on which back-off takes no time."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


def directory(folder: Path, *scripts: tuple[list[object], bool]) -> RayDirectory:
    """``scripts``: what each life of the helper tells, and whether it then dies."""
    files = []
    for number, (events, dies) in enumerate(scripts):
        file = folder / f"{number}{'-dies' if dies else ''}"
        file.write_bytes(b"".join(encoded(event) for event in events))  # type: ignore[arg-type]
        files.append(str(file))
    command = [sys.executable, "-c", PLAYER, str(folder / "lives"), *files]
    return RayDirectory(START, log=folder / "helper.log", command=command, clock=NoWait())


async def test_nodes_are_found_with_devices_named_after_them(tmp_path: Path) -> None:
    refused = NodeRefused(name="b", id="2", reason="another version", remedy="install it")
    nodes = directory(
        tmp_path, ([HelperReady(ray="2"), found("a"), refused, NodesSettled()], False)
    )
    await nodes.start()
    assert nodes.nodes["a"].usable
    [device] = nodes.nodes["a"].devices
    assert (device.id, device.node, device.uuid) == ("a/gpu:0", "a", "GPU-1")
    assert not nodes.nodes["b"].usable
    assert "install it" in nodes.nodes["b"].refused
    await nodes.close(end_nodes=False)


async def test_a_helper_that_ends_is_started_again_and_what_was_missed_is_told(
    tmp_path: Path,
) -> None:
    changes: list[ClusterNode] = []
    nodes = directory(
        tmp_path,
        ([HelperReady(ray="2"), found("a"), found("b", "2"), NodesSettled()], True),
        ([HelperReady(ray="2")], True),
        ([HelperReady(ray="2"), found("b", "3"), NodesSettled()], False),
    )
    again = asyncio.Event()

    def changed(node: ClusterNode) -> None:
        changes.append(node)
        if node.lost:
            again.set()

    nodes._changed = changed
    await nodes.start()
    async with asyncio.timeout(60.0):
        await again.wait()
    assert [(node.name, bool(node.lost)) for node in changes] == [
        ("a", False),
        ("b", False),
        ("a", True),
    ]
    assert nodes.nodes["b"].usable
    assert nodes.silent == ""
    assert isinstance(nodes._clock, NoWait)
    assert nodes._clock.slept == [1.0, 2.0]
    await nodes.close(end_nodes=True)


async def test_a_cluster_that_cannot_be_joined_is_an_error_of_the_start(tmp_path: Path) -> None:
    failure = HelperFailure(reason="no Ray head answers", remedy="check the address", final=False)
    nodes = directory(tmp_path, ([failure], True))
    with pytest.raises(OServeError, match="no Ray head answers") as caught:
        await nodes.start()
    assert caught.value.remedy == "check the address"


async def test_a_helper_that_ends_without_a_word_is_an_error_of_the_start(tmp_path: Path) -> None:
    nodes = directory(tmp_path, ([], True))
    with pytest.raises(OServeError, match="ended with status"):
        await nodes.start()


def test_silence_and_losses(tmp_path: Path) -> None:
    nodes = directory(tmp_path, ([], True))
    nodes.handle(found("a"))
    nodes.handle(RaySilent(reason="no answer"))
    assert nodes.silent
    assert nodes.nodes["a"].usable
    nodes.handle(RayBack())
    assert not nodes.silent
    # The end of an earlier life, told late, is not that of this one.
    nodes.handle(found("a", "2"))
    nodes.handle(NodeLost(name="a", id="1", reason="old"))
    assert nodes.nodes["a"].usable
    nodes.handle(NodeLost(name="a", id="2", reason="power"))
    assert nodes.nodes["a"].lost == "Ray: power"
    nodes.handle(found("a", "3", port=2))
    assert nodes.nodes["a"].usable


def test_no_token_is_shown(tmp_path: Path) -> None:
    nodes = directory(tmp_path, ([], True))
    nodes.handle(found("a"))
    assert "secret" not in repr(nodes.nodes)
    assert "secret" not in repr(found("a"))
