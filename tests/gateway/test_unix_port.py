"""The gateway's Unix socket: it serves as the port does, and takes nobody's path."""

import socket
import stat
from pathlib import Path

import aiohttp
import pytest

from gateway.conftest import Make
from oserve.core import OServeError
from oserve.gateway.access.unix_port import clear_unix_socket
from oserve.gateway.settings import GatewaySettings
from oserve.sim import EmulatedEngine

BODY = {"model": "emulated", "prompt": "hello there", "max_tokens": 3}


def settings(path: Path) -> GatewaySettings:
    return GatewaySettings(port=0, shutdown_grace_s=0.0, unix_socket=str(path))


async def test_it_serves_beside_the_port_and_leaves_nothing(
    make_front: Make, tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    front = await make_front(EmulatedEngine(), settings=settings(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.post("http://x/v1/completions", json=BODY) as answer,
    ):
        assert (await answer.json())["choices"][0]["text"] == " t1 t2 t3"
    async with front.session.post(front.url + "/v1/completions", json=BODY) as answer:
        assert answer.status == 200
    await front.gateway.close()
    assert not path.exists()


async def test_a_path_that_is_taken_stays_with_its_owner(make_front: Make, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    first = await make_front(EmulatedEngine(), settings=settings(path))
    with pytest.raises(OServeError, match="another server listens"):
        await make_front(settings=settings(path))
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.get("http://x/live") as answer,
    ):
        assert answer.status == 200
    # Its file was replaced: the one that is there is not removed.
    path.unlink()
    second = await make_front(EmulatedEngine(), settings=settings(path))
    await first.gateway.close()
    assert path.exists()
    await second.gateway.close()
    assert not path.exists()


def test_the_socket_of_a_server_that_is_gone_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    clear_unix_socket(str(path))
    assert not path.exists()


def test_a_path_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(OServeError, match="no socket"):
        clear_unix_socket(str(file))
    assert file.read_text(encoding="utf-8") == "mine"
    with pytest.raises(OServeError, match="folder is not there"):
        clear_unix_socket(str(tmp_path / "none" / "api.sock"))
    with pytest.raises(OServeError, match="longer than 107"):
        clear_unix_socket("/" + "a" * 107)
    with pytest.raises(OServeError, match="not absolute"):
        clear_unix_socket("api.sock")
