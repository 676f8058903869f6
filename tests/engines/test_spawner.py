"""Launchers with stand-in servers: no process survives, whichever ends first."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from oserve.core import OServeError
from oserve.engines import spawner
from oserve.engines.group import group_activity, group_members
from oserve.engines.spawner import EngineProcess, SpawnLauncher, ZygoteLauncher

# Like vLLM: a leader, a child that ignores TERM, and something worth reading in the log.
SERVER = """
import os, signal, subprocess, sys, time
print(os.environ["COLOUR"], sorted(os.sched_getaffinity(0)), sys.argv[1:], flush=True)
if "fail" in sys.argv:
    sys.exit(7)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
async def launcher() -> AsyncIterator[SpawnLauncher]:
    launcher = SpawnLauncher((sys.executable, "-c", SERVER))
    yield launcher
    await launcher.close()


def parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1])


def is_up(log: Path) -> bool:
    return log.exists() and "up" in log.read_text()


async def start(launcher: SpawnLauncher, log: Path, *argv: str) -> EngineProcess:
    process = await launcher.start(argv, {"COLOUR": "blue"}, [0], log)
    async with asyncio.timeout(20):
        while not argv and not is_up(log):  # noqa: ASYNC110 - it looks at a file
            await asyncio.sleep(0.02)
    return process


async def test_what_is_stopped_is_seen_and_killed(launcher: SpawnLauncher, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = await start(launcher, log)
    before = group_activity(process.pid, log)
    assert before is not None
    assert before.stopped == 0
    assert before.work_s > 0.0
    assert before.moved >= log.stat().st_size
    members = group_members(process.pid)
    for member in members:
        os.kill(member, signal.SIGSTOP)
    async with asyncio.timeout(20):
        while (seen := group_activity(process.pid)) and seen.stopped < len(members):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    process.terminate()
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    assert group_members(process.pid) == []
    assert group_activity(process.pid) is None


async def test_output_environment_and_cores(launcher: SpawnLauncher, tmp_path: Path) -> None:
    process = await start(launcher, tmp_path / "log", "fail", "--x")
    assert await process.wait() == 7
    assert (tmp_path / "log").read_text() == "blue [0] ['fail', '--x']\n"


async def test_kill_ends_the_whole_session(launcher: SpawnLauncher, tmp_path: Path) -> None:
    process = await start(launcher, tmp_path / "log")
    assert len(group_members(process.pid)) == 2
    process.terminate()  # the leader goes, and what ignores TERM is cleared away after it
    assert await process.wait() == -signal.SIGTERM
    assert group_members(process.pid) == []
    process.kill()


async def test_a_killed_supervisor_leaves_nothing(launcher: SpawnLauncher, tmp_path: Path) -> None:
    process = await start(launcher, tmp_path / "log")
    os.kill(parent_of(process.pid), signal.SIGKILL)
    await process.wait()
    assert group_members(process.pid) == []


async def test_close_ends_all(launcher: SpawnLauncher, tmp_path: Path) -> None:
    processes = [await start(launcher, tmp_path / str(number)) for number in range(2)]
    await launcher.close()
    for process in processes:
        assert group_members(process.pid) == []
        await process.wait()


async def test_without_a_zygote_engines_are_spawned(
    launcher: SpawnLauncher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    async def no_zygote(log_path: Path) -> None:
        tried.append(log_path)
        raise OServeError("no vLLM", place="engines", remedy="install it")

    monkeypatch.setattr(spawner._ZygoteLine, "open", no_zygote)
    zygote = ZygoteLauncher(log_path=tmp_path / "zygote.log", fallback=launcher)
    for _ in range(2):
        process = await zygote.start(("fail",), {"COLOUR": "red"}, [0], tmp_path / "log")
        assert await process.wait() == 7
    assert len(tried) == 1
    assert "no vLLM" in caplog.text
    await zygote.close()
