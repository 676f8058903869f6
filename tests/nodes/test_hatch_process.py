"""The hatch as its keeper holds it: a process with its orders on standard input."""

import asyncio
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import msgspec
import pytest

from hatches import IDENTITY, LIMIT_S, opened
from oserve.core import OServeError
from oserve.engines.weights.sockets import OUT_SOCKET
from oserve.nodes.hatch_blocking import dial_hatch
from oserve.nodes.hatch_identity import make_identity, serving_context, stored_identity
from oserve.nodes.hatch_messages import (
    ADDRESS_FILE,
    HatchConfig,
    PublishedHatch,
    read_published,
)


async def start(config: bytes) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oserve.nodes.hatch"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(config + b"\n")
    return process


async def published(folder: Path, process: asyncio.subprocess.Process) -> PublishedHatch:
    async with asyncio.timeout(LIMIT_S):
        while (found := read_published(folder)) is None:
            assert process.returncode is None
            await asyncio.sleep(0.01)
    return found


def second_process(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def test_the_life_of_a_hatch(tmp_path: Path) -> None:
    folder = tmp_path / "n"
    folder.mkdir(mode=0o700)
    config = HatchConfig(node="n", folder=str(folder), host="127.0.0.1")
    process = await start(msgspec.json.encode(config))
    found = await published(folder, process)
    assert found.pid == process.pid
    assert stat.S_IMODE((folder / ADDRESS_FILE).stat().st_mode) == 0o600
    address = found.address("127.0.0.1")
    reader, writer = await opened(address, "echo")
    writer.write(b"x\n")
    assert await reader.readline() == b"x\n"
    bulk = await asyncio.to_thread(lambda: dial_hatch(address, "echo", timeout_s=LIMIT_S))
    bulk.close()
    assert (folder / OUT_SOCKET).exists()
    # Without the process that relays weights it is no hatch: its keeper starts both again.
    other_folder = tmp_path / "other"
    other_folder.mkdir(mode=0o700)
    other = await start(
        msgspec.json.encode(msgspec.structs.replace(config, folder=str(other_folder)))
    )
    await published(other_folder, other)
    os.kill(second_process(other.pid), signal.SIGKILL)
    assert await asyncio.wait_for(other.wait(), LIMIT_S) == 1
    # It goes with whoever holds its standard input, and takes what it published along.
    assert process.stdin is not None
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
    assert list(folder.iterdir()) == []
    assert process.stderr is not None
    assert found.token.encode() not in await process.stderr.read()
    writer.close()


async def test_what_a_hatch_cannot_start_with(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    config = HatchConfig(node="n", folder=str(folder), host="127.0.0.1", identity=IDENTITY)
    process = await start(msgspec.json.encode(config))
    _, said = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 2
    assert b"other users can enter it" in said
    assert b"Traceback" not in said
    assert IDENTITY.token.encode() not in said


def test_secrets_do_not_show() -> None:
    shown = repr(IDENTITY) + repr(HatchConfig(node="n", folder="", host="", identity=IDENTITY))
    address = PublishedHatch(pid=1, port=2, certificate="CERT", token="SECRET").address("h")
    shown += repr(address)
    for secret in (IDENTITY.key, IDENTITY.token, "SECRET", "CERT"):
        assert secret not in shown


def test_an_identity_is_kept_privately(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "identity.json"
    made = stored_identity(file, "n")
    assert stored_identity(file, "n") == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(OServeError, match="other users can read"):
        stored_identity(file, "n")
    file.chmod(0o600)
    file.write_text("{}")
    with pytest.raises(OServeError, match="cannot be read"):
        stored_identity(file, "n")
    serving_context(made)
    with pytest.raises(OServeError, match="cannot be used together"):
        serving_context(
            type(made)(certificate=made.certificate, key=make_identity("n").key, token="")
        )


def test_listening_where_something_listens_is_told(tmp_path: Path) -> None:
    from oserve.nodes.hatch import _listening  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = HatchConfig(
            node="n", folder=str(tmp_path), host="127.0.0.1", port=taken.getsockname()[1]
        )
        with pytest.raises(OServeError, match=os.strerror(98)):
            _listening(config)
