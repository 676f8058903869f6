"""The keeper as a process, and how the next one ends what a killed keeper has left."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from oserve.core import OServeError
from oserve.engines.group import boot_id, group_members, start_ticks
from oserve.engines.holding import (
    HeldEngines,
    KeeperPlace,
    LocalDial,
    keeper_runs,
    private_folder,
)
from oserve.engines.registry import (
    Registry,
    RegistryEntry,
    end_leftovers,
    read_registry,
    write_registry,
)
from oserve.startup.lock import StateLock

# A leader that says it is up, and a child that ignores TERM.
SERVER = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


@pytest.fixture
async def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HeldEngines]:
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{before}")
    engines = held(tmp_path)
    yield engines
    await engines.close()
    assert not private_folder(tmp_path).exists() or not list(private_folder(tmp_path).iterdir())
    private_folder(tmp_path).rmdir()


def held(state_dir: Path) -> HeldEngines:
    place = KeeperPlace(
        folder=private_folder(state_dir),
        state_dir=state_dir,
        log_dir=state_dir,
        method="spawn",
        grace_s=60.0,
    )
    return HeldEngines(LocalDial(place), grace_s=60.0)


def registry_of(folder: Path) -> Registry:
    found = read_registry(folder / "keeper.json")
    assert found is not None
    return found


async def test_it_outlives_its_server_and_its_children_do_not_outlive_it(
    engines: HeldEngines, tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    assert not keeper_runs(tmp_path)
    first = await engines.launch("a-1", [], {}, [], log, "note")
    assert keeper_runs(tmp_path)
    await engines.hold("p:0", ["cat"], "orders", tmp_path / "cat.log", 0.0, None)
    [entry] = [entry for entry in registry_of(tmp_path).held if entry.engine]
    assert (entry.pid, entry.note) == (first.pid, "note")
    assert entry.started_ticks == start_ticks(first.pid) != 0
    # Another server takes its place, while this one has not closed.
    again = held(tmp_path)
    await again.connect()
    [taken] = again.engines().values()
    assert (taken.pid, taken.entry.note) == (first.pid, "note")
    cat = again.processes()["p:0"]
    os.kill(registry_of(tmp_path).pid, signal.SIGKILL)
    await taken.wait()
    assert group_members(first.pid) == []
    await cat.wait()
    assert (tmp_path / "cat.log").read_text() == "orders\n"
    # The next start makes another keeper.
    second = await again.launch("a-2", [], {}, [], log, None)
    assert group_members(second.pid)
    await again.close()
    assert group_members(second.pid) == []
    assert not (tmp_path / "keeper.json").exists()
    assert not keeper_runs(tmp_path)


@pytest.mark.slow
async def test_a_keeper_of_another_environment_ends_first(
    engines: HeldEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await engines.launch("a-1", [], {}, [], tmp_path / "log", None)
    monkeypatch.setenv("VLLM_ANYTHING", "1")
    again = held(tmp_path)
    await again.connect()
    assert again.engines() == {}
    assert group_members(first.pid) == []
    await again.close()


@pytest.mark.slow
async def test_a_detached_keeper_is_nobody_s_child(tmp_path: Path) -> None:
    place = KeeperPlace(
        folder=private_folder(tmp_path),
        state_dir=tmp_path,
        log_dir=tmp_path,
        method="spawn",
        grace_s=60.0,
        detached=True,
    )
    agent = HeldEngines(LocalDial(place), grace_s=60.0, guest=True)
    await agent.connect()
    assert keeper_runs(tmp_path)
    pid = registry_of(tmp_path).pid
    assert os.getpgid(pid) == pid != os.getpgrp()
    assert os.getsid(pid) == pid
    # The agent leaves; the next one finds it.
    await agent.close()
    again = HeldEngines(LocalDial(place), grace_s=60.0)
    await again.connect()
    assert registry_of(tmp_path).pid == pid
    await again.close()
    assert not keeper_runs(tmp_path)
    private_folder(tmp_path).rmdir()


async def test_a_missing_program_is_reported(engines: HeldEngines, tmp_path: Path) -> None:
    with pytest.raises(OServeError, match="no-such-program"):
        await engines.hold("p:0", ["no-such-program"], "", tmp_path / "log", 0.0, None)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A group such as an engine's."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        process_group=0,
    )
    while len(group_members(process.pid)) < 2:
        continue
    yield process
    for pid in group_members(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def entry_of(process: "subprocess.Popen[bytes]", folder: Path, ticks: int = 0) -> RegistryEntry:
    return RegistryEntry(
        name="a-1",
        engine=True,
        log="",
        pid=process.pid,
        started_ticks=ticks or start_ticks(process.pid),
        folder=str(folder / "elsewhere" if ticks else folder),
    )


@pytest.mark.slow
def test_what_a_killed_keeper_left_is_ended(
    group: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    write_registry(tmp_path / "keeper.json", [entry_of(group, tmp_path / "none")])
    assert end_leftovers(tmp_path / "keeper.json") == ["a-1"]
    assert group_members(group.pid) == []


@pytest.mark.slow
def test_so_are_helpers_whose_leader_is_gone(
    group: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    entry = entry_of(group, tmp_path)
    group.kill()
    group.wait()
    assert len(group_members(group.pid)) == 1
    write_registry(tmp_path / "keeper.json", [msgspec.structs.replace(entry, folder="/other")])
    assert end_leftovers(tmp_path / "keeper.json") == []
    write_registry(tmp_path / "keeper.json", [entry])
    assert end_leftovers(tmp_path / "keeper.json") == ["a-1"]
    assert group_members(group.pid) == []


def test_a_number_that_was_given_to_another_process_is_not_touched(
    group: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    file = tmp_path / "keeper.json"
    write_registry(file, [entry_of(group, tmp_path, start_ticks(group.pid) - 1)])
    assert end_leftovers(file) == []
    # Nor after the machine was started again.
    good = Registry(boot=boot_id() + "x", pid=1, held=[entry_of(group, tmp_path)])
    file.write_bytes(msgspec.json.encode(good))
    assert end_leftovers(file) == []
    file.write_text("{")
    assert end_leftovers(file) == []
    assert len(group_members(group.pid)) == 2


def test_one_server_at_a_time(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "state")
    with pytest.raises(OServeError, match=f"process {os.getpid()}"):
        StateLock(tmp_path / "state")
    lock.release()
    lock.release()
    StateLock(tmp_path / "state").release()


def test_the_folder_for_sockets_is_ours_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path)
    assert len(str(folder)) < 30
    assert private_folder(tmp_path) == folder
    folder.chmod(0o755)
    with pytest.raises(OServeError, match="other users"):
        private_folder(tmp_path)
    folder.rmdir()


async def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from oserve.startup.lock import StateLock; "
        "lock = StateLock(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(tmp_path)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    with pytest.raises(OServeError, match="another server"):
        StateLock(tmp_path)
    process.kill()
    await process.communicate()
    StateLock(tmp_path).release()
