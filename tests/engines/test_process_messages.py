"""Messages of the zygote and of supervisors, and a zygote's line that carries others."""

import asyncio
import sys
from pathlib import Path

import pytest

from oserve.core import OServeError
from oserve.engines.process_messages import (
    EngineExited,
    EngineFork,
    EngineForked,
    ForkRefused,
    SupervisorReady,
    ZygoteEvent,
    ZygoteReady,
    encoded,
    fork_of,
    supervisor_ready_of,
    zygote_event_of,
)
from oserve.engines.spawner import SpawnLauncher, _ZygoteLine

FORK = EngineFork(
    name="1", argv=["--x", "a:b"], env={"A": "1"}, cores=[0, 3], threads=2, log="/l\n"
)
EVENTS: list[ZygoteEvent] = [
    ZygoteReady(),
    EngineForked(name="1", pid=7),
    EngineExited(name="1", status=-9),
    ForkRefused(name="1", reason="no\nmemory"),
]


def test_each_message_is_one_line_that_the_other_side_reads() -> None:
    assert fork_of(encoded(FORK)) == FORK
    assert [zygote_event_of(encoded(event)) for event in EVENTS] == EVENTS
    assert supervisor_ready_of(encoded(SupervisorReady(pid=7))) == SupervisorReady(pid=7)
    for message in (FORK, *EVENTS):
        assert encoded(message).count(b"\n") == 1


def test_what_the_zygote_cannot_read_is_refused_with_the_reason() -> None:
    for change, reason in (
        ((b'"threads":2', b'"threads":"two"'), "Expected `int`"),
        ((b'"EngineFork"', b'"EngineThaw"'), "Invalid value"),
    ):
        refused = fork_of(encoded(FORK).replace(*change))
        assert isinstance(refused, ForkRefused)
        assert refused.name == "1"
        assert reason in refused.reason
    assert fork_of(b"nonsense").name == ""
    assert supervisor_ready_of(b"") is None
    assert supervisor_ready_of(b"12\n") is None


async def test_a_supervisor_that_ends_early_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Standing in for the interpreter, it prints a number as other programs would.
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 12\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launcher = SpawnLauncher(("none",))
    with pytest.raises(OServeError, match="the supervisor ended before"):
        await launcher.start((), {}, [], tmp_path / "log")
    await launcher.close()


async def test_a_zygote_that_refuses_fails_that_start_and_one_that_babbles_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # It answers each line with the next of its own.
    code = (
        "import sys\n"
        "for line in sys.argv[1:]:\n"
        "    sys.stdin.readline(); print(line, flush=True)\n"
        "sys.stdin.read()"
    )
    lines = [encoded(ForkRefused(name="1", reason="no memory")).decode().strip(), "nonsense"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *lines),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    line = _ZygoteLine(process, process.stdout, process.stdin)
    for reason in ("no memory", "the zygote ended"):
        with pytest.raises(OServeError, match=reason):
            await line.start((), {}, [], Path("log"))
    await line.lost
    assert "cannot read a message of the zygote" in caplog.text
