"""The contract of attached servers, held to an emulated engine that speaks as each kind does."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from contract.backends import CONTRACT, Backend, Behind, behind
from oserve.sim import DIALECTS, Dialect, EmulatedEngine
from oserve.sim.dialects import UsageForm
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


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
async def test_attached_servers_keep_the_contract(
    front: Behind, promise: Callable[[Behind], Any]
) -> None:
    await promise(front)
