"""The contract of attached servers, held to an emulated engine that speaks as each kind does.

And to one on a Unix socket, as engines of this node are, and behind a hatch, as those of others.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from contract.backends import CONTRACT, Backend, Behind, behind, is_found_well
from hatches import LIMIT_S, running_hatch
from oserve.engines.probe import Probe
from oserve.sim import DIALECTS, Dialect, EmulatedEngine
from oserve.sim.dialects import VLLM, UsageForm
from oserve.sim.tokenizer_stub import BabblingTokenizer


@pytest.fixture(params=DIALECTS, ids=lambda dialect: dialect.name)
async def front(request: pytest.FixtureRequest) -> AsyncIterator[Behind]:
    dialect: Dialect = request.param
    engine = EmulatedEngine(model="theirs", dialect=dialect, tokenizer=BabblingTokenizer())
    port = await engine.start()
    refuses = "stream_options" in dialect.refused
    health = (dialect.health or ("/v1/models",))[0]
    backend = Backend(
        url=f"http://127.0.0.1:{port}{dialect.prefix}",
        model="theirs",
        reports_usage=dialect.usage is not UsageForm.NEVER and not refuses,
        nonsense=frozenset({dialect.error_status}),
        # One that is not where it is looked for first is found by its models.
        health=health if health != "/" else "/v1/models",
    )
    async with behind(backend) as behind_it:
        yield behind_it
    await engine.stop()


@pytest.fixture(params=["socket", "hatch"])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Behind]:
    async with contextlib.AsyncExitStack() as opened:
        name, address = str(tmp_path / "api.sock"), None
        path = Path(name)
        if request.param == "hatch":
            hatch = await opened.enter_async_context(running_hatch(tmp_path))
            name, address = "e-1/api.sock", hatch.address
            path = hatch.listener(name)
        # The same engine twice: the gateway's way to it, and that of whoever asks it directly.
        fields = {"model": "theirs", "dialect": VLLM, "tokenizer": BabblingTokenizer()}
        engines = [EmulatedEngine(**fields) for _ in range(2)]  # type: ignore[arg-type]
        port = await engines[0].start()
        await engines[1].start(unix_socket=str(path))
        for one in engines:
            opened.push_async_callback(one.stop)
        backend = Backend(
            url=f"http://127.0.0.1:{port}",
            model="theirs",
            nonsense=frozenset({VLLM.error_status}),
            unix_socket=name,
            hatch=address,
        )
        yield await opened.enter_async_context(behind(backend))


@pytest.mark.parametrize(
    "promise", [one for one in CONTRACT if one is not is_found_well], ids=lambda one: one.__name__
)
async def test_engines_keep_it_on_a_socket_and_behind_a_hatch(
    engine: Behind, promise: Callable[[Behind], Any]
) -> None:
    await promise(engine)


async def test_probes_reach_engines_behind_a_hatch(engine: Behind) -> None:
    async with Probe(engine.backend.endpoint, timeout_s=LIMIT_S) as probe:
        assert await probe.healthy()
        models = await probe.models()
        assert models is not None
        assert [model.name for model in models] == ["theirs"]
        load = await probe.load()
        assert load is not None
        assert load.running == 0


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
async def test_attached_servers_keep_the_contract(
    front: Behind, promise: Callable[[Behind], Any]
) -> None:
    await promise(front)
