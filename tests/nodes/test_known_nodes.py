"""What a server remembers of nodes: all that it needs to reach them, and for its user alone."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from hatches import IDENTITY
from oserve.core import Device, HatchAddress, OServeError
from oserve.engines.keeper_messages import NodeFacts
from oserve.nodes.directory import ClusterNode
from oserve.nodes.host_cluster import HostDirectory, HostEntry
from oserve.nodes.known_nodes import KnownNodes, server_owner
from oserve.wire.hatch import fingerprint_of

HATCH = HatchAddress(host="10.0.0.2", port=7443, certificate=IDENTITY.certificate, token="secret-7")
NODE = ClusterNode(
    name="a",
    hatch=HATCH,
    devices=(Device(id="a/cpu:0", kind="cpu", node="a", memory_bytes=5, cores=(0, 1)),),
    facts=NodeFacts(host="a", bf16=True),
    labels={"zone": "east"},
)


def test_nodes_that_were_reached_are_known_again(tmp_path: Path) -> None:
    folder = tmp_path / "hatches"
    known = KnownNodes(folder, "ray")
    assert known.read() == {}
    known.write({"a": replace(NODE, lost="Ray: it is dead"), "b": ClusterNode(name="b")})
    assert KnownNodes(folder, "ray").read() == {"a": NODE}
    assert KnownNodes(folder, "ray:10.0.0.9:6379").read() == {}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in folder.iterdir()] == [0o600]


def test_a_broken_file_is_told_without_its_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "known.json").write_text('{"cluster": "ray", "nodes": ["secret-7"]}')
    with caplog.at_level(logging.WARNING):
        assert KnownNodes(tmp_path, "ray").read() == {}
    assert "cannot be read" in caplog.text
    assert "secret-7" not in caplog.text


async def test_a_name_that_no_host_can_have_is_told_as_that_host_s(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-7\n")
    token.chmod(0o600)
    host = HostEntry(
        name="a", address="a..b", port=7443, token_file=str(token), certificate_sha256="0" * 64
    )
    with pytest.raises(OServeError, match=r"no host answers; a: "):
        await HostDirectory([host]).start()


def test_a_host_is_known_only_as_the_file_has_it() -> None:
    host = HostEntry(
        name="a",
        address="10.0.0.2",
        port=7443,
        token_file="token",
        certificate_sha256=fingerprint_of(IDENTITY.certificate),
    )
    assert HostDirectory([host], known={"a": NODE}).nodes == {"a": NODE}
    for other in (replace(host, port=7444), replace(host, certificate_sha256="0" * 64)):
        assert HostDirectory([other], known={"a": NODE}).nodes == {"a": ClusterNode(name="a")}


def test_a_server_keeps_its_name_for_nodes_with_its_state_folder(tmp_path: Path) -> None:
    folder = tmp_path / "hatches"
    owner = server_owner(tmp_path, folder)
    assert server_owner(tmp_path, folder) == owner
    assert owner.title.endswith(f":{tmp_path}")
    assert owner.key not in owner.title
    assert (folder / "server").stat().st_mode & 0o077 == 0
    # Another folder is another server.
    assert server_owner(tmp_path / "other", tmp_path / "other" / "hatches").key != owner.key
