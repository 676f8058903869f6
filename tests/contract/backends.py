"""What OServe asks of any server that it is attached to; held to emulated and real ones alike.

What a client reads through the gateway is what the server says when it is asked directly.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, HatchAddress, LengthClass, ReplicaPhase
from oserve.engines.attached import AttachedProbe
from oserve.engines.probe import Probe
from oserve.gateway.http.server import Gateway
from oserve.gateway.settings import GatewaySettings
from oserve.wire.events import EventReader

NAME = "ours"
PATHS = ("/v1/completions", "/v1/chat/completions")


@dataclass(kw_only=True)
class Backend:
    """A running server. ``reports_usage``: its streams do, if asked; ``model``: its name there.

    ``unix_socket``, ``hatch``: the gateway reaches it there; ``url`` is where it is asked directly.
    """

    url: str
    model: str
    reports_usage: bool = True
    health: str = ""
    nonsense: frozenset[int] = frozenset({400})
    api_key: str = ""
    unix_socket: str = ""
    hatch: HatchAddress | None = None

    @property
    def endpoint(self) -> Endpoint:
        if self.unix_socket:
            return Endpoint(unix_socket=self.unix_socket, hatch=self.hatch, api_key=self.api_key)
        return Endpoint(url=self.url, api_key=self.api_key)


@dataclass(kw_only=True)
class Behind:
    """A gateway in front of a server, and a session for both."""

    backend: Backend
    gateway: Gateway
    url: str
    session: aiohttp.ClientSession

    async def post(self, base: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.session.post(base + path, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def stream(self, base: str, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, JSON and [DONE], read as the standard says."""
        async with self.session.post(base + path, json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            text = await answer.read()
            kind = answer.headers.get("content-type", "")
        if base == self.url:
            assert kind.startswith("text/event-stream")
            assert b"\r" not in text
            assert text.endswith(b"\n\n")
        reader = EventReader()
        found = [event.data for event in reader.feed(text) if event.data is not None]
        done = b"[DONE]" if base == self.url else b"[DONE] "
        return ["[DONE]" if item in {b"[DONE]", done} else json.loads(item) for item in found]


@asynccontextmanager
async def behind(backend: Backend, **fields: Any) -> AsyncIterator[Behind]:
    """A gateway that is attached to this server alone."""
    replica = TableReplica(
        id="far",
        shape="tp1-bf16-2048",
        phase=ReplicaPhase.READY,
        endpoint=backend.endpoint,
        max_inflight=64,
        max_model_len=0,
        accepts_priority=False,
        returns_token_ids=False,
        prefill_s_per_token=1e-4,
        decode_s_per_token=1e-3,
        model=backend.model,
        attached=True,
        **fields,
    )
    gateway = Gateway(GatewaySettings(port=0, shutdown_grace_s=0.0), models=(NAME,))
    gateway.runner.update(
        RoutingTable(
            plan_id="p",
            length_classes=(LengthClass(name="all"),),
            routing_shares={"all": {"far": 1.0}},
            replicas=(replica,),
            expected=False,
        )
    )
    url = f"http://127.0.0.1:{await gateway.listen()}"
    limit = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=limit) as session:
        yield Behind(backend=backend, gateway=gateway, url=url, session=session)
    await gateway.close()


def wish(path: str, **more: Any) -> dict[str, Any]:
    """A request that is answered alike each time."""
    said: Any = {"prompt": "The capital of France is"}
    if "chat" in path:
        said = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    return {"model": NAME, "max_tokens": 5, "temperature": 0, **said, **more}


def heard(events: list[Any]) -> tuple[str, list[str], int]:
    """Text, reasons of the end, and how many times ``[DONE]`` was said."""
    text, ends, done = "", [], 0
    for event in events:
        if event == "[DONE]":
            done += 1
            continue
        for choice in event.get("choices") or ():
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            if choice.get("finish_reason") is not None:
                ends.append(choice["finish_reason"])
    return text, ends, done


def usages(events: list[Any]) -> list[dict[str, Any]]:
    """Every report of token counts."""
    return [event["usage"] for event in events if event != "[DONE]" and event.get("usage")]


def direct(body: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """The same, for the server itself."""
    return {**body, "model": backend.model}


async def whole_answers(front: Behind) -> None:
    """An answer that comes whole is the server's own, and its tokens are counted."""
    base = front.backend.url.removesuffix("/v1")
    for path in PATHS:
        body = wish(path)
        status, expected = await front.post(base, path, direct(body, front.backend))
        assert status == 200, expected
        status, got = await front.post(front.url, path, body)
        assert status == 200, got
        for answer in (expected, got):
            for name in ("id", "created"):
                answer.pop(name, None)
        assert got == expected


async def streams(front: Behind) -> None:
    """A stream says the same, in one form, and reports usage only on request."""
    base = front.backend.url.removesuffix("/v1")
    for path in PATHS:
        body = wish(path)
        expected = heard(await front.stream(base, path, direct(body, front.backend)))
        assert expected[0]
        assert expected[2] == 1
        for options in (None, {"include_usage": False}, {"include_usage": True}):
            more = {} if options is None else {"stream_options": options}
            events = await front.stream(front.url, path, {**body, **more})
            assert heard(events) == expected, (path, options)
            assert events[-1] == "[DONE]"
            reports = usages(events)
            asked = bool(options and options["include_usage"])
            assert len(reports) == int(asked and front.backend.reports_usage), (path, options)


async def counts(front: Behind) -> None:
    """Tokens are counted as the server reports them, or about an event each."""
    metrics = front.gateway.runner.metrics
    before = metrics.snapshot()["oserve_output_tokens"].get("all", [0.0])[0]
    await front.stream(front.url, PATHS[0], wish(PATHS[0]))
    made = metrics.snapshot()["oserve_output_tokens"]["all"][0] - before
    assert made == 5 if front.backend.reports_usage else 5 <= made <= 6


async def client_library(front: Behind) -> None:
    """OpenAI's client reads it."""
    client = openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)
    for options in (openai.omit, {"include_usage": True}):
        stream = await client.chat.completions.create(
            **wish(PATHS[1]), stream=True, stream_options=options
        )
        text = "".join([e.choices[0].delta.content or "" async for e in stream if e.choices])
        whole = await client.chat.completions.create(**wish(PATHS[1]))
        assert text == whole.choices[0].message.content
    await client.close()


async def nonsense(front: Behind) -> None:
    """What the server refuses is passed on as it refuses it, and the slot is free again."""
    base = front.backend.url.removesuffix("/v1")
    body = wish(PATHS[0], max_tokens=-1)
    expected = await front.post(base, PATHS[0], direct(body, front.backend))
    assert expected[0] in front.backend.nonsense
    assert await front.post(front.url, PATHS[0], body) == expected
    assert front.gateway.runner.outstanding()["far"] == (0.0, 0)


async def is_found_well(front: Behind) -> None:
    """Its health path is found, and its name among its models where it lists them."""
    backend = front.backend
    async with Probe(backend.endpoint, timeout_s=300) as probe:
        found = await AttachedProbe(probe, backend.endpoint, backend.model).try_out()
    assert (found.trouble, found.doubt) == ("", "")
    assert found.health == backend.health


CONTRACT: tuple[Callable[[Behind], Any], ...] = (
    whole_answers,
    streams,
    counts,
    client_library,
    nonsense,
    is_found_well,
)
