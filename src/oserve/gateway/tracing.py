"""Spans of requests for OpenTelemetry: one for each request, with an event for each step of it.

The client's ``traceparent`` is the parent, and replicas get the span's own, so that the engine's
spans are its children. Spans are exported by a thread of the SDK; while no collector answers, its
queue is bounded and what does not fit is dropped.
"""

import time
from collections.abc import Mapping
from typing import Any

from oserve.control.dispatch import commands as do
from oserve.core import FinishStatus
from oserve.core.errors import OServeError
from oserve.gateway.settings import TracingSettings
from oserve.gateway.stream.session import Session

_PARENT, _STATE = b"traceparent", b"tracestate"
_NS_PER_S = 1_000_000_000
_GOOD = {FinishStatus.COMPLETED, FinishStatus.CLIENT_ERROR, FinishStatus.DISCONNECTED}


class Untraced:
    """No spans."""

    def arrived(self, session: Session) -> None:
        """See ``RequestTracer``."""

    def accepted(self, session: Session) -> None:
        """See ``RequestTracer``."""

    def event(self, number: int, name: str, **attributes: str | int | float) -> None:
        """See ``RequestTracer``."""

    def ended(self, session: Session, command: do.Record) -> None:
        """See ``RequestTracer``."""

    def close(self) -> None:
        """See ``RequestTracer``."""


def tracer_of(settings: TracingSettings) -> "RequestTracer | Untraced":
    """The tracer of a gateway process. Raises OServeError if the extra is missing."""
    return RequestTracer(settings) if settings.otlp_endpoint else Untraced()


class RequestTracer:
    """The spans of one gateway process. ``exporter``: where they go; by default the endpoint."""

    def __init__(self, settings: TracingSettings, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import (  # noqa: PLC0415
                ParentBasedTraceIdRatio,
            )
            from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
                TraceContextTextMapPropagator,
            )

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                    OTLPSpanExporter,
                )

                exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint)
        except ImportError as error:
            raise OServeError(
                f"OpenTelemetry is not installed ({error})",
                place="gateway.tracing.otlp_endpoint",
                remedy="pip install 'oserve[otel]'",
            ) from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": settings.service_name}),
            sampler=ParentBasedTraceIdRatio(settings.sample),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("oserve.gateway")
        self._contexts = TraceContextTextMapPropagator()
        # Of requests that run, by number.
        self._spans: dict[int, Any] = {}

    def arrived(self, session: Session) -> None:
        """Begin a span; what the replica gets as ``traceparent`` is its own."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415

        headers, form = session.exchange.headers, session.parsed.form
        carrier = {
            name.decode(): headers[name].decode("latin-1")
            for name in (_PARENT, _STATE)
            if name in headers
        }
        span = self._tracer.start_span(
            f"POST {form.path.decode()}",
            context=self._contexts.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_known(session),
        )
        own: dict[str, str] = {}
        self._contexts.inject(own, set_span_in_context(span))
        for name in (_PARENT, _STATE):
            if (value := own.get(name.decode())) is not None:
                headers[name] = value.encode()
        self._spans[session.number] = span

    def accepted(self, session: Session) -> None:
        """The machine knows the request, and has sent it or lets it wait."""
        if session.replica is None:
            self.event(session.number, "queued")

    def event(self, number: int, name: str, **attributes: str | int | float) -> None:
        """A step of a request that runs."""
        span = self._spans.get(number)
        if span is not None:
            span.add_event(name, attributes)

    def ended(self, session: Session, command: do.Record) -> None:
        """End the span of a request."""
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

        span = self._spans.pop(session.number, None)
        if span is None:
            return
        if session.first_byte_s:
            ago_s = time.monotonic() - session.first_byte_s
            span.add_event("first token", timestamp=time.time_ns() - round(ago_s * _NS_PER_S))
        span.set_attributes(_found(session, command))
        span.add_event("done")
        if command.status not in _GOOD:
            span.set_status(Status(StatusCode.ERROR, command.status.value))
        span.end()

    def close(self) -> None:
        """Export what is left, for some seconds at most."""
        self._provider.shutdown()


def _known(session: Session) -> Mapping[str, Any]:
    """Attributes at the arrival, by the names of OpenTelemetry's conventions where they exist."""
    request = session.request
    found: dict[str, Any] = {"oserve.request_id": session.request_id.decode("latin-1")}
    if session.parsed.model:
        found["gen_ai.request.model"] = session.parsed.model
    if session.parsed.output_limit is not None:
        found["gen_ai.request.max_tokens"] = session.parsed.output_limit
    if request is not None:
        found["oserve.workload_type"] = request.workload_type
        found["oserve.expected_output_tokens"] = request.output_tokens
        if request.promise is not None:
            found["oserve.tier"] = request.promise.tier.name
    return found


def _found(session: Session, command: do.Record) -> Mapping[str, Any]:
    """Attributes at the end."""
    found: dict[str, Any] = {
        "oserve.status": command.status.value,
        "oserve.replica": command.replica,
        "oserve.moves": command.moves,
    }
    usage = session.usage
    if usage.prompt_tokens is not None:
        found["gen_ai.usage.input_tokens"] = usage.prompt_tokens
    if usage.output_tokens is not None:
        found["gen_ai.usage.output_tokens"] = usage.output_tokens
    return found
