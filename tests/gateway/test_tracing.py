"""Spans of requests, as a collector gets them."""

from typing import Any

import pytest

from gateway.conftest import Make, until
from oserve.core.errors import OServeError
from oserve.gateway.settings import GatewaySettings, TracingSettings
from oserve.gateway.tracing import RequestTracer, Untraced, tracer_of
from oserve.sim import EmulatedEngine

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
pytestmark = pytest.mark.extra

TEXT = {"model": "emulated", "prompt": "hello there", "max_tokens": 5}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def traced(make_front: Make, *engines: EmulatedEngine) -> tuple[Any, Any]:
    """A gateway, and the exporter of its spans."""
    front = await make_front(*engines)
    exporter = memory.InMemorySpanExporter()
    front.gateway.runner.tracer = RequestTracer(TracingSettings(), exporter)
    return front, exporter


def spans_of(front: Any, exporter: Any) -> list[Any]:
    front.gateway.runner.tracer.close()
    return list(exporter.get_finished_spans())


async def test_a_span_is_between_the_clients_and_the_engines(make_front: Make) -> None:
    engine = EmulatedEngine()
    front, exporter = await traced(make_front, engine)
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    await front.post("/v1/completions", TEXT, headers=given)
    await until(lambda: not front.gateway.runner.active)
    [span] = spans_of(front, exporter)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    _, headers = engine.heads[-1]
    passed = f"00-{TRACE}-{span.context.span_id:016x}-01".encode()
    assert (headers[b"traceparent"], headers[b"tracestate"]) == (passed, b"a=b")
    assert [event.name for event in span.events] == ["sent", "first token", "done"]
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.attributes["oserve.workload_type"] == "short"
    assert span.attributes["oserve.replica"] == "r0"
    times = [event.timestamp for event in span.events]
    assert times == sorted(times)


async def test_a_client_that_does_not_sample_is_not_traced(make_front: Make) -> None:
    front, exporter = await traced(make_front, EmulatedEngine())
    given = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    await front.post("/v1/completions", TEXT, headers=given)
    assert spans_of(front, exporter) == []


async def test_retries_and_refusals_are_told(make_front: Make) -> None:
    bad, good = EmulatedEngine(), EmulatedEngine()
    bad.status = 500
    front, exporter = await traced(make_front, bad, good)
    for _ in range(3):
        await front.post("/v1/completions", TEXT)
    good.status = 500
    await front.post("/v1/completions", TEXT)
    await until(lambda: not front.gateway.runner.active)
    spans = spans_of(front, exporter)
    retried = [event for span in spans for event in span.events if event.name == "retried"]
    assert {event.attributes["replica"] for event in retried} >= {"r0"}
    assert [span.status.is_ok for span in spans] == [True, True, True, False]
    assert front.gateway.runner.tracer._spans == {}


async def test_a_malformed_traceparent_begins_a_trace(make_front: Make) -> None:
    front, exporter = await traced(make_front, EmulatedEngine())
    status, _, _ = await front.post("/v1/completions", TEXT, headers={"traceparent": "\xff-no"})
    assert status == 200
    [span] = spans_of(front, exporter)
    assert span.parent is None


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tracer_of(GatewaySettings().tracing), Untraced)
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(OServeError, match="OpenTelemetry is not installed") as caught:
        tracer_of(TracingSettings(otlp_endpoint="http://127.0.0.1:4318/v1/traces"))
    assert "oserve[otel]" in caught.value.remedy
