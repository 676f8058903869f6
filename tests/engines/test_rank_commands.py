"""Commands to ranks: what a rank reads, what it refuses, and what the server makes of replies."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import Endpoint, VirtualClock
from oserve.engines.control import EngineControl, EngineControlError
from oserve.engines.mover import Mover
from oserve.engines.rank_commands import (
    COMMANDS,
    METHOD,
    REPLIES,
    AbortJob,
    CommandDone,
    CommandRefused,
    DescribeLayout,
    JobReport,
    LayoutReply,
    ListenerReply,
    MoveShards,
    OpenListener,
    ParameterLayout,
    RankCommand,
    RankReply,
    ReportJob,
    SumShards,
    TakeUpWeights,
)
from oserve.switch.rank_order import RankOrder, ShardConversion, ShardPart, StagedTensor
from oserve.switching.weights import MoveError

names = st.text(min_size=1, max_size=8)
counts = st.integers(0, 1 << 40)
edges = st.tuples(counts, counts)
parts = st.lists(st.builds(ShardPart, names, st.lists(edges, max_size=3).map(tuple)), max_size=3)
peers = st.integers(0, 9)
orders = st.builds(
    RankOrder,
    replica=names,
    rank=peers,
    sends=st.dictionaries(peers, parts, max_size=2),
    receives=st.dictionaries(peers, parts, max_size=2),
    staged=st.dictionaries(
        names, st.builds(StagedTensor, st.lists(counts, max_size=3).map(tuple), names), max_size=2
    ),
    convert=st.lists(
        st.builds(
            ShardConversion,
            names,
            st.sampled_from(["int8", "cast"]),
            st.lists(peers, max_size=3).map(tuple),
        ),
        max_size=2,
    ),
)
commands = st.one_of(
    st.sampled_from([DescribeLayout(), OpenListener(), ReportJob(), TakeUpWeights(), AbortJob()]),
    st.builds(
        MoveShards,
        name=names,
        number=peers,
        addresses=st.lists(names, max_size=2),
        limit_s=st.floats(0.1, 1e6),
        order=orders,
        bytes_per_s=st.floats(0, 1e12),
    ),
    st.builds(SumShards, name=names, parts=parts, as_received=st.booleans()),
)


def encoded(message: RankCommand | RankReply) -> str:
    return msgspec.json.encode(message).decode()


@given(command=commands)
def test_a_rank_reads_what_the_server_wrote(command: RankCommand) -> None:
    assert COMMANDS.decode(encoded(command)) == command


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "Freeze"}, "Invalid value 'Freeze'"),
        ({"limit_s": 0}, "> 0.0"),
        ({"bytes_per_s": -1}, ">= 0.0"),
        ({"number": "two"}, "Expected `int`"),
        ({"order": {"replica": "a"}}, "missing required field `rank`"),
        ({"order": {"replica": "a", "rank": 0, "sends": {"x": []}}}, "Expected `int`"),
        (
            {"order": {"replica": "a", "rank": 0, "convert": [["w", "int3", [0]]]}},
            "Invalid enum value 'int3'",
        ),
    ],
)
def test_what_a_rank_cannot_read_is_named(change: dict[str, object], reason: str) -> None:
    order = RankOrder(replica="a", rank=0)
    whole = encoded(MoveShards(name="t", number=0, addresses=[], limit_s=1.0, order=order))
    text = msgspec.json.encode({**msgspec.json.decode(whole), **change}).decode()
    with pytest.raises(msgspec.ValidationError, match=reason.replace("`", ".")):
        COMMANDS.decode(text)


class Engine:
    """Answers an engine's control route with one reply per rank; remembers the commands."""

    def __init__(self) -> None:
        self.replies: list[RankReply | str] = []
        self.heard: list[list[RankCommand]] = []

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == METHOD
        [told] = body["args"]
        self.heard.append([COMMANDS.decode(text) for text in told])
        return web.json_response(
            {"results": [one if isinstance(one, str) else encoded(one) for one in self.replies]}
        )


@pytest.fixture
async def engine(nothing_is_left: Path) -> AsyncIterator[tuple[Engine, Endpoint]]:
    engine = Engine()
    application = web.Application()
    application.router.add_post("/collective_rpc", engine.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    path = nothing_is_left / "engine.sock"
    await web.UnixSite(runner, str(path)).start()
    yield engine, Endpoint(unix_socket=str(path))
    await runner.cleanup()
    path.unlink(missing_ok=True)


async def test_replies_come_back_as_they_were_sent(engine: tuple[Engine, Endpoint]) -> None:
    fake, endpoint = engine
    layout = LayoutReply(parameters={"w": ParameterLayout((2, 3), "bfloat16")})
    fake.replies = [layout, layout]
    assert REPLIES.decode(encoded(layout)) == layout
    async with EngineControl(endpoint) as control:
        assert await control.command(DescribeLayout(), LayoutReply) == [layout, layout]
        fake.replies = [CommandDone(), CommandDone()]
        own = [SumShards(name=name, parts=[]) for name in "ab"]
        assert await control.command(own, CommandDone) == [CommandDone()] * 2
    assert fake.heard == [[DescribeLayout()], own]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (CommandRefused(reason="rank 0: no memory"), "rank 0: no memory"),
        (ListenerReply(address="x"), "a CommandDone was expected, and a ListenerReply came"),
        ('{"type": "Thawed"}', "another version of OServe"),
        ("None", "another version of OServe"),
    ],
)
async def test_what_a_rank_does_not_do_is_an_error(
    engine: tuple[Engine, Endpoint], reply: RankReply | str, reason: str
) -> None:
    fake, endpoint = engine
    fake.replies = [reply]
    async with EngineControl(endpoint) as control:
        with pytest.raises(EngineControlError, match=reason):
            await control.command(TakeUpWeights(), CommandDone)


async def test_a_rank_that_fails_is_named_with_its_replica_whatever_its_id(
    engine: tuple[Engine, Endpoint],
) -> None:
    fake, endpoint = engine
    fake.replies = [JobReport(state="done"), JobReport(state="failed", reason="out: of luck")]
    mover = Mover({"a:1": endpoint}, VirtualClock())
    with pytest.raises(MoveError, match=r"^a:1 rank 1: out: of luck$"):
        await mover._reports(["a:1"], 10.0)
    fake.replies = [JobReport(state="none")]
    with pytest.raises(MoveError, match=r"^a:1 rank 0: none$"):
        await asyncio.wait_for(mover._reports(["a:1"], 10.0), 60.0)
    await mover.close()


@pytest.mark.extra
def test_a_rank_takes_its_own_command_and_refuses_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    # Importing the worker's module would patch vLLM in this process.
    monkeypatch.setattr("oserve.engines.patches.apply", lambda stage: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    extension = importlib.import_module("oserve.engines.worker_extension")
    worker = extension.WorkerExtension()
    worker.rank, worker.vllm_config = 1, None
    worker.model_runner = SimpleNamespace(get_model=object)

    def reply(*commands: RankCommand | str) -> RankReply:
        told = [one if isinstance(one, str) else encoded(one) for one in commands]
        return REPLIES.decode(worker.oserve_command(told))

    opened = ListenerReply(address=str(tmp_path / "w1.sock"))
    assert reply(OpenListener()) == opened
    assert reply(AbortJob(), OpenListener()) == opened
    assert reply(ReportJob()) == JobReport(state="none")
    assert reply(AbortJob()) == CommandDone()
    order = RankOrder(replica="a", rank=1)
    move = MoveShards(name="t", number=1, addresses=[], limit_s=1.0, order=order)
    for told, reason in (
        ((DescribeLayout(),), "does not keep its weights"),
        ((move,), "no listener was opened"),
        (("{}",), "missing required field `type`"),
        (('{"type":"Freeze"}',), "Invalid value 'Freeze'"),
        ((), "0 commands came"),
    ):
        refused = reply(*told)
        assert isinstance(refused, CommandRefused)
        assert refused.reason.startswith("rank 1: ")
        assert reason in refused.reason
