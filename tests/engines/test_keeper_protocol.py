"""Messages between a server and its keeper, of this version and of others."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.test_cluster import FakeLauncher
from oserve.control.progress import Activity
from oserve.core import OServeError
from oserve.engines.keeper import Keeper
from oserve.engines.keeper_connection import KeeperConnection, LineTerms
from oserve.engines.keeper_messages import (
    MAX_LINE_BYTES,
    PROTOCOL_VERSION,
    ActivityQuery,
    ActivityReport,
    CloseKeeper,
    EndProcesses,
    EngineStart,
    KeeperCommand,
    KeeperEvent,
    KeeperHello,
    MessageRejected,
    NodeFacts,
    NoteUpdate,
    Ping,
    Pong,
    ProcessExited,
    ProcessSignal,
    ProcessStart,
    ProcessStarted,
    ServerHello,
    ServerReplaced,
    StartRefused,
    command_of,
    encoded,
    event_of,
)
from oserve.engines.registry import RegistryEntry


async def opened(path: Path, identity: str = "same") -> KeeperConnection | None:
    """A connection to the keeper at ``path``; ``None`` if none answers."""
    terms = LineTerms(
        node="n",
        place=str(path),
        local=True,
        differs=lambda hello: "" if hello.identity == identity else "another",
    )
    try:
        streams = await asyncio.open_unix_connection(str(path), limit=MAX_LINE_BYTES)
    except OSError:
        return None
    return await KeeperConnection.greeted(streams, terms)


names = st.text(min_size=1, max_size=12)
notes = st.none() | names | st.dictionaries(names, st.integers(-9, 9) | names, max_size=2)
counts = st.integers(0, 1 << 30)
commands = st.one_of(
    st.builds(ServerHello, grace_s=st.floats(0, 1e6), silence_s=st.floats(0, 1e6)),
    st.builds(
        EngineStart,
        name=names,
        argv=st.lists(names, max_size=3),
        env=st.dictionaries(names, names, max_size=2),
        cores=st.lists(counts, max_size=3),
        log=names,
        folder=names,
        note=notes,
    ),
    st.builds(
        ProcessStart,
        name=names,
        argv=st.lists(names, max_size=3),
        first_line=names,
        log=names,
        grace_s=st.floats(0, 1e6),
        stays=st.booleans(),
        note=notes,
    ),
    st.builds(NoteUpdate, name=names, note=notes),
    st.builds(ProcessSignal, name=names, number=st.integers(1, 64)),
    st.builds(ActivityQuery, name=names, log=st.booleans()),
    st.sampled_from([Ping(), EndProcesses(), CloseKeeper()]),
)
facts = st.builds(NodeFacts, host=names, oserve=names, engine=names, boot=names, folder=names)
activities = st.builds(
    Activity,
    stopped=counts,
    blocked=st.booleans(),
    work_s=st.floats(0, 1e6),
    moved=counts,
)
entries = st.builds(RegistryEntry, name=names, engine=st.booleans(), log=names, note=notes)
events = st.one_of(
    st.builds(
        KeeperHello, identity=names, pid=counts, held=st.lists(entries, max_size=2), node=facts
    ),
    st.builds(ProcessStarted, name=names, pid=counts),
    st.builds(StartRefused, name=names, reason=names),
    st.builds(ProcessExited, name=names, status=st.integers(-64, 255), cause=names),
    st.builds(ActivityReport, name=names, activity=st.none() | activities, cause=names),
    st.sampled_from([Pong(), ServerReplaced()]),
    st.builds(MessageRejected, name=names, reason=names),
)


@given(command=commands, event=events)
def test_each_message_is_one_line_that_the_other_side_reads(
    command: KeeperCommand, event: KeeperEvent
) -> None:
    for line in (encoded(command), encoded(event)):
        assert line.count(b"\n") == 1
    assert command_of(encoded(command)) == command
    assert event_of(encoded(event)) == event


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        (b'{"type":"Freeze","name":"a:1"}', "a:1", "Invalid value 'Freeze'"),
        (b'{"type":"Signal","name":"a","number":"nine"}', "a", "Expected `int`"),
        (b'{"type":"Start","name":"a"}', "a", "missing required field"),
        (b'{"name":"a"}', "a", "missing required field `type`"),
        (b'["a"]', "", "Expected `object`"),
        (b"not JSON", "", "malformed"),
    ],
)
def test_what_the_keeper_cannot_read_is_rejected_with_the_reason(
    line: bytes, name: str, reason: str
) -> None:
    rejected = command_of(line)
    assert isinstance(rejected, MessageRejected)
    assert rejected.name == name
    assert reason in rejected.reason
    assert f"protocol {PROTOCOL_VERSION}" in rejected.reason


class OtherKeeper:
    """Says what it is given to a server that connects, and remembers what the server says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def listen(self, *lines: bytes) -> asyncio.Server:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writers.append(writer)
            writer.write(b"".join(line + b"\n" for line in lines))
            while line := await reader.readline():
                self.heard.append(line)
                writer.close()

        return await asyncio.start_unix_server(serve, str(self.path))


@pytest.fixture
async def other(nothing_is_left: Path) -> AsyncIterator[OtherKeeper]:
    path = nothing_is_left / "other.sock"
    yield OtherKeeper(path)
    path.unlink(missing_ok=True)


async def test_a_keeper_of_another_version_is_recognised_and_told_to_end(
    other: OtherKeeper,
) -> None:
    hello = {"type": "Hello", "identity": "same", "pid": os.getpid(), "held": [{"odd": 1}]}
    async with await other.listen(msgspec.json.encode(hello), b'{"type":"Unheard"}'):
        line = await opened(other.path)
        assert line is not None
        assert "version 0" in line.difference
        assert f"version {PROTOCOL_VERSION}" in line.difference
        assert line.held == {}
        await line.close()
        assert other.heard == [b'{"type":"Close"}\n']


async def test_what_does_not_greet_as_a_keeper_is_named(other: OtherKeeper) -> None:
    for greeting in (b"HTTP/1.1 400 Bad Request", b'{"type":"Started","name":"a","pid":1}'):
        async with await other.listen(greeting):
            with pytest.raises(OServeError, match="does not greet as a keeper") as caught:
                await opened(other.path)
            assert caught.value.place == str(other.path)
            other.writers.pop().close()
    assert await opened(other.path.with_name("none.sock")) is None


async def test_an_unknown_message_of_the_keeper_ends_nothing(
    other: OtherKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    held = [RegistryEntry(name=name, engine=False, log="", pid=1) for name in ("a", "b")]
    hello = KeeperHello(identity="same", pid=os.getpid(), held=held)
    ended = ProcessExited(name="a", status=3)
    lines = [msgspec.json.encode(hello), b'{"type":"Frozen"}', msgspec.json.encode(ended)]
    async with await other.listen(*lines):
        line = await opened(other.path)
        assert line is not None
        assert line.difference == ""
        assert await line.held["a"].wait() == 3
        assert list(line.held) == ["b"]
        assert "cannot read a message of the keeper" in caplog.text
        await line.close()


async def test_a_start_that_the_keeper_cannot_read_fails_and_the_keeper_serves_on(
    nothing_is_left: Path, tmp_path: Path
) -> None:
    folder = nothing_is_left / "keeper"
    keeper = Keeper(
        folder=folder,
        registry=tmp_path / "keeper.json",
        launcher=FakeLauncher(),
        identity="same",
        grace_s=600.0,
    )
    running = asyncio.create_task(keeper.run())
    path = folder / "keeper.sock"
    async with asyncio.timeout(60.0):
        while (line := await opened(path)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
    odd = EngineStart(name="a:1", argv=[], env={}, cores=[], log="")
    line._writer.write(encoded(odd).replace(b'"argv":[]', b'"argv":0'))
    process = line.hold(ProcessStart(name="p", argv=[], first_line="", log="", grace_s=0.0))
    line.held["a:1"] = type(process)(line.send, RegistryEntry(name="a:1", engine=True, log=""))
    with pytest.raises(OServeError, match="cannot read a message"):
        await line.held["a:1"].begun()
    # The next message is read: its program does not exist.
    with pytest.raises(OServeError, match="cannot start a process"):
        await process.begun()
    await line.close()
    await running


async def test_what_is_asked_for_while_a_keeper_s_engines_end_is_refused(
    other: OtherKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(*_arguments: object, **_more: object) -> None:
        ending.set()
        await go_on.wait()

    monkeypatch.setattr(asyncio, "to_thread", slowly)
    engine = RegistryEntry(name="e", engine=True, log="", pid=1 << 30)
    hello = KeeperHello(identity="same", pid=1 << 30, held=[engine])
    server = await other.listen(msgspec.json.encode(hello))
    line = await opened(other.path)
    assert line is not None
    held = line.held["e"]
    other.writers[0].close()
    async with asyncio.timeout(30.0):
        await ending.wait()
        late = line.hold(ProcessStart(name="late", argv=[], first_line="", log="", grace_s=0.0))
        go_on.set()
        assert await held.wait() < 0
        with pytest.raises(OServeError, match="the keeper ended"):
            await late.begun()
        await line.lost
    server.close()
