"""A running request goes on at a real engine of another layout, with its KV cache."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from oserve.core import (
    Clock,
    Endpoint,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
)
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import split_cores
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher
from oserve.wire.caches import FIELD, CacheFolder, giving, new_name, taking

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LIMIT_S = 300.0
# No multiple of a block's 128 tokens, so that the last block is there in part.
PROMPT = [(7 * number) % 250 + 5 for number in range(700)]
TOKENS = 60


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(
    tiny_model: Path, tmp_path: Path, live_clock: Clock, zygote: Launcher
) -> AsyncIterator[EngineCluster]:
    cluster = EngineCluster(
        split_cores(sorted(os.sched_getaffinity(0)), 5),
        model=str(tiny_model),
        served_model_name="tiny",
        run_dir=tmp_path,
        clock=live_clock,
        settings=EngineSettings(),
        launcher=zygote,
    )
    yield cluster
    await cluster.close()


def replica(name: str, *devices: str, tp: int = 1, pp: int = 1) -> ReplicaSpec:
    shape = ReplicaShape(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=Precision.FP32,
        max_num_batched_tokens=512,
        max_num_seqs=8,
    )
    return ReplicaSpec(id=name, shape=shape, devices=devices)


async def started(cluster: EngineCluster, *specs: ReplicaSpec) -> dict[str, Endpoint]:
    for spec in specs:
        await cluster.apply(StartReplica(spec=spec))
    async with asyncio.timeout(LIMIT_S):
        while True:
            seen = await cluster.observe()
            assert not seen.failures
            ready = [s for s in seen.replicas if s.phase is ReplicaPhase.READY]
            if len(ready) == len(specs):
                return {s.spec.id: s.endpoint for s in ready}
            await asyncio.sleep(0.05)


class Engine:
    """One engine's API."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.folder = CacheFolder(endpoint.caches)
        self.path = Path(endpoint.caches)
        self._session = aiohttp.ClientSession(
            "http://engine", connector=aiohttp.UnixConnector(endpoint.unix_socket)
        )

    async def tokens(
        self, prompt: list[int], limit: int, fields: dict[str, str], *, stop_after: int = 0
    ) -> list[int]:
        """Greedy; ``stop_after`` so many the cache is asked for and the connection closed."""
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            FIELD: fields,
        }
        found: list[int] = []
        async with self._session.post("/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                found += json.loads(line[6:])["choices"][0]["token_ids"] or []
                if stop_after and len(found) >= stop_after:
                    self.folder.ask(fields["oserve"])
                    break
        return found

    async def given(self, name: str) -> None:
        """Wait until all of a cache is there."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                if self.folder.note(name) is not None:
                    return
                await asyncio.sleep(0.01)

    async def taken_tokens(self) -> float:
        """Prompt tokens that came from elsewhere so far."""
        async with self._session.get("/metrics") as answer:
            text = await answer.text()
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("vllm:prompt_tokens_by_source_total")
            and 'source="external_kv_transfer"' in line
        )

    async def close(self) -> None:
        await self._session.close()


async def test_any_layout_takes_any_other_s_cache(cluster: EngineCluster) -> None:
    found = await started(
        cluster,
        replica("single", "cpu:0"),
        replica("wide", "cpu:1", "cpu:2", tp=2),
        replica("deep", "cpu:3", "cpu:4", pp=2),
    )
    engines = {name: Engine(endpoint) for name, endpoint in found.items()}
    whole = await engines["single"].tokens(PROMPT, TOKENS, giving(new_name()))
    assert len(whole) == TOKENS
    for source, target in (
        ("single", "wide"),
        ("wide", "deep"),
        ("deep", "single"),
        ("wide", "single"),
    ):
        name = new_name()
        # Each begins otherwise: nothing is in the target's own cache.
        prompt = [*([ord(source[0])] * 130), *PROMPT]
        expected = await engines[source].tokens(prompt, TOKENS, giving(new_name()))
        begun = await engines[source].tokens(prompt, TOKENS, giving(name), stop_after=20)
        before = await engines[target].taken_tokens()
        rest = await engines[target].tokens(
            [*prompt, *begun], TOKENS - len(begun), giving(new_name()) | taking(name)
        )
        assert [*begun, *rest] == expected
        taken = await engines[target].taken_tokens() - before
        assert taken == len(prompt) + len(begun) - 1
    # What has a part that is torn is computed: by all ranks, whichever of them noticed.
    for source, target, part in (("wide", "single", 1), ("single", "wide", 0), ("wide", "deep", 0)):
        name = new_name()
        prompt = [*([ord(source[0]) + 9 * part + 1] * 130), *PROMPT]
        expected = await engines[source].tokens(prompt, TOKENS, giving(new_name()))
        begun = await engines[source].tokens(prompt, TOKENS, giving(name), stop_after=20)
        await engines[source].given(name)
        torn = engines[source].folder.part(name, part)
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        rest = await engines[target].tokens(
            [*prompt, *begun], TOKENS - len(begun), giving(new_name()) | taking(name)
        )
        assert [*begun, *rest] == expected
    # A cache that no engine has written is computed.
    rest = await engines["wide"].tokens(PROMPT, 5, taking(new_name()))
    assert rest == whole[:5]
    # What is given up unasked leaves nothing, and what was taken in is gone.
    await engines["single"].tokens(PROMPT[:300], 5, giving(new_name()))
    assert list(engines["single"].path.iterdir()) == []
    for engine in engines.values():
        await engine.close()
