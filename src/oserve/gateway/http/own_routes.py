"""The gateway's own routes: models, health, status, metrics, and operators' calls."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import unquote

import msgspec

from oserve import __version__
from oserve.core import Caller
from oserve.core.faults import fault
from oserve.gateway.access.door import admin_needed
from oserve.gateway.http.errors import (
    ApiError,
    internal,
    send_error,
    shown,
    unavailable,
    with_status,
)
from oserve.gateway.http.openapi import openapi_document
from oserve.gateway.metrics import BY_TENANT, exposition, merged
from oserve.gateway.records import RecordSink
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings
from oserve.wire import Exchange
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.gateway")

MODELS = b"/v1/models"
SWITCHES = b"/oserve/v1/switches"

Operate = Callable[[str, bytes, str, str], Awaitable[tuple[int, bytes]]]
"""From path, body, actor and source of an operator's call to status and body of its answer."""


class OwnRoutes:
    """What a gateway process answers itself. ``refresh``, if set, updates the cluster snapshot.

    ``operate``, if set, answers operators' calls. ``away_s``, if set, returns the seconds since the
    control loop became unreachable, or 0.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        models: tuple[str, ...],
        records: RecordSink | None = None,
        estimator: OutputEstimator | None = None,
    ) -> None:
        self.runner = RequestRunner(settings, records, estimator)
        self._settings = settings
        self._models = models
        self._started_s = int(time.time())
        self.refresh: Callable[[], Awaitable[None]] | None = None
        self.operate: Operate | None = None
        self.away_s: Callable[[], float] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse(
        self,
        exchange: Exchange,
        error: ApiError,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """Answer with an error, and count it."""
        self.runner.metrics.count("oserve_request_errors", error.reason or error.code or error.type)
        request_id = exchange.headers[b"x-request-id"]
        send_error(exchange, error, (*headers, *error.headers, (b"x-request-id", request_id)))

    def failed(self, exchange: Exchange, error: Exception) -> None:
        """End one request after a fault in the gateway."""
        request_id = exchange.headers[b"x-request-id"]
        _log.error("request %s failed in the gateway: %s", shown(request_id), fault(error))
        self.refuse(exchange, internal())

    def answer_models(self, exchange: Exchange, caller: Caller) -> None:
        """All models, or the one that the path names."""
        path = exchange.path.partition(b"?")[0]
        entries = self._model_entries()
        if path == MODELS:
            exchange.respond(200, msgspec.json.encode({"object": "list", "data": entries}))
            return
        wanted = unquote(path.removeprefix(MODELS + b"/").decode("latin-1"))
        for entry in entries:
            if entry["id"] == wanted:
                exchange.respond(200, msgspec.json.encode(entry))
                return
        raise self.no_model(wanted)

    def no_model(self, name: str) -> ApiError:
        """404: another model is asked for."""
        return ApiError(
            status=404,
            message=f"The model `{name[:200]}` is not served here; "
            f"available: {', '.join(f'`{known}`' for known in self._models)}",
            type="not_found_error",
            param="model",
            code="model_not_found",
        )

    def _model_entries(self) -> list[dict[str, Any]]:
        lengths = [
            item.max_model_len for item in self.runner.serving.values() if item.max_model_len
        ]
        return [
            {
                "id": name,
                "object": "model",
                "created": self._started_s,
                "owned_by": "oserve",
                "root": self._models[0],
                "parent": None,
                "max_model_len": max(lengths, default=None),
            }
            for name in self._models
        ]

    def answer_load(self, exchange: Exchange, caller: Caller) -> None:
        """Running and waiting requests of this process, in vLLM's form."""
        exchange.respond(200, b'{"server_load":%d}' % len(self.runner.active))

    def answer_openapi(self, exchange: Exchange, caller: Caller) -> None:
        """The routes, in OpenAPI's form; the bodies are OpenAI's, Anthropic's and vLLM's."""
        exchange.respond(200, openapi_document())

    def answer_health(self, exchange: Exchange, caller: Caller) -> None:
        if self.runner.serving:
            exchange.respond(200, b"{}")
        else:
            send_error(exchange, unavailable("No replica can serve now"))

    def answer_version(self, exchange: Exchange, caller: Caller) -> None:
        exchange.respond(200, msgspec.json.encode({"version": __version__}))

    def fresh(self, answer: Callable[[Exchange, Caller], None]) -> Callable[..., None]:
        """Answer from a new snapshot, or from the last one while no control loop answers."""

        async def refreshed(
            exchange: Exchange, caller: Caller, refresh: Callable[[], Awaitable[None]]
        ) -> None:
            with contextlib.suppress(OSError):
                await refresh()
            answer(exchange, caller)

        def answered(exchange: Exchange, caller: Caller) -> None:
            if self.refresh is None or (self.away_s is not None and self.away_s()):
                answer(exchange, caller)
            else:
                self._later(exchange, refreshed(exchange, caller, self.refresh))

        return answered

    def answer_status(self, exchange: Exchange, caller: Caller) -> None:
        """The last status of the control loop, with its age if the loop is unreachable.

        Who is no admin gets what concerns its own tenant.
        """
        if not caller.is_admin:
            exchange.respond(200, msgspec.json.encode(self.tenant_status(caller)))
            return
        status = bytes(self.runner.snapshot.status)
        away_s = self.away_s() if self.away_s is not None else 0.0
        if away_s:
            status = msgspec.json.encode(
                {**msgspec.json.decode(status), "controller_away_s": round(away_s, 1)}
            )
        exchange.respond(200, status)

    def tenant_status(self, caller: Caller) -> dict[str, Any]:
        """What a tenant may see: itself, and whether it is served."""
        return {
            "version": __version__,
            "model": self._models[0],
            "serving": bool(self.runner.serving),
            "tenant": caller.tenant,
            "role": caller.role.value,
            "tier": caller.tier,
            "allowed_tiers": list(caller.allowed_tiers),
            **self.runner.tenants.limits.document(caller.tenant, time.monotonic()),
        }

    def answer_switches(self, exchange: Exchange, caller: Caller) -> None:
        """All switches, or the one with the id in the path; for admins."""
        if not caller.is_admin:
            raise admin_needed()
        known = bytes(self.runner.snapshot.switches)
        path = exchange.path.partition(b"?")[0]
        if path == SWITCHES:
            exchange.respond(200, b'{"switches":' + known + b"}")
            return
        wanted = path.removeprefix(SWITCHES + b"/").decode("latin-1")
        for document in msgspec.json.decode(known):
            if document["id"] == wanted:
                exchange.respond(200, msgspec.json.encode(document))
                return
        raise with_status(404, f"There is no switch {wanted[:64]}", code="not_found")

    def answer_metrics(self, exchange: Exchange, caller: Caller) -> None:
        if self.refresh is None:
            self._expose(exchange, caller)
        else:
            self._later(exchange, self._refresh_and_expose(exchange, caller, self.refresh))

    def _later(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except ApiError as error:
                self.refuse(exchange, error)
            except Exception as error:  # an unforeseen fault ends this request alone
                self.failed(exchange, error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def answer_operator(self, exchange: Exchange, caller: Caller) -> None:
        if not caller.is_admin:
            raise admin_needed()
        if self.operate is None:
            raise unavailable("No control loop operates this gateway")
        self._later(exchange, self._operated(exchange, caller, self.operate))

    async def _operated(self, exchange: Exchange, caller: Caller, operate: Operate) -> None:
        actor = f"{caller.tenant}/{caller.key}" if caller.key else "anybody"
        try:
            path = exchange.path.partition(b"?")[0].decode("latin-1")
            status, body = await operate(path, exchange.body, actor, exchange.peer)
        except OSError:
            send_error(exchange, unavailable("The control loop is unreachable"))
        else:
            exchange.respond(status, body)

    async def _refresh_and_expose(
        self, exchange: Exchange, caller: Caller, refresh: Callable[[], Awaitable[None]]
    ) -> None:
        """Any process may be scraped, so only fresh sums are monotonic."""
        try:
            await refresh()
        except OSError:
            if self._settings.processes > 1 or self._settings.placement != "server":
                raise unavailable("The counters of the other processes are unreachable") from None
        self._expose(exchange, caller)

    def _expose(self, exchange: Exchange, caller: Caller) -> None:
        """All metrics; those by tenant only for admins."""
        runner = self.runner
        gauges: dict[str, dict[tuple[str, ...], float]] = {}
        for name, labels, value in runner.snapshot.gauges:
            gauges.setdefault(name, {})[tuple(labels)] = value
        inflight = {name: float(count) for name, (_, count) in runner.outstanding().items()}
        for name, (_, count) in runner.snapshot.elsewhere.items():
            inflight[name] = inflight.get(name, 0.0) + count
        gauges["oserve_requests_inflight"] = {(name,): n for name, n in inflight.items()}
        queued = runner.queued + runner.snapshot.queued
        gauges["oserve_requests_queued"] = {(): float(queued)}
        away_s = 0.0 if self.away_s is None else self.away_s()
        gauges["oserve_controller_away_seconds"], alone = {(): away_s}, away_s > 0.0
        merged_metrics = {} if alone else runner.snapshot.metrics
        own = merged_metrics or runner.metrics.snapshot()
        counts = merged([own, runner.snapshot.counters])
        text = exposition(counts, gauges, without=() if caller.is_admin else BY_TENANT)
        exchange.respond(200, text, content_type=b"text/plain; version=0.0.4; charset=utf-8")
