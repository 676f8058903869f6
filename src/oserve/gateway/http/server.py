"""The gateway's endpoints: authentication, its own routes, and admission of requests."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from oserve import __version__
from oserve.control.dispatch.order import rank_s
from oserve.core import Request
from oserve.core.faults import fault
from oserve.gateway.constants import constants_of
from oserve.gateway.http.body import GenerateBody, parse_body
from oserve.gateway.http.errors import (
    ApiError,
    bad_request,
    internal,
    send_error,
    shown,
    unavailable,
    with_status,
)
from oserve.gateway.http.prompt import prompt_size
from oserve.gateway.http.request_ids import RequestIds
from oserve.gateway.metrics import exposition, merged
from oserve.gateway.records import RecordSink
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.stream.session import Session
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.gateway")

_GENERATE = {b"/v1/chat/completions", b"/v1/completions"}
_AUXILIARY = {b"/tokenize", b"/detokenize"}
_SWITCHES = b"/oserve/v1/switches"
_OPERATED = {b"/oserve/v1/plan", b"/oserve/v1/switch", b"/oserve/v1/nodes"}
_REQUEST_ID_BYTES = 128
_PRIORITY = b"x-vllm-priority"
_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")


class Gateway:
    """One gateway process. ``refresh``, if set, updates the cluster snapshot before a scrape.

    ``operate``, if set, answers operators' calls: from path and body to status and body.
    ``away_s``, if set, returns the seconds since the control loop became unreachable, or 0.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        models: tuple[str, ...],
        api_keys: frozenset[str] = frozenset(),
        records: RecordSink | None = None,
        estimator: OutputEstimator | None = None,
    ) -> None:
        self.runner = RequestRunner(settings, records, estimator)
        self._settings = settings
        self._models = models
        self._keys = [hashlib.sha256(key.encode()).digest() for key in sorted(api_keys)]
        self._started_s = int(time.time())
        self._server: HttpServer | None = None
        self.refresh: Callable[[], Awaitable[None]] | None = None
        self.operate: Callable[[str, bytes], Awaitable[tuple[int, bytes]]] | None = None
        self.away_s: Callable[[], float] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = RequestIds()
        self._constants = constants_of(settings)
        self._routes: dict[bytes, tuple[bytes, bool, Callable[[Exchange], None]]] = {
            b"/v1/models": (b"GET", True, self._answer_models),
            b"/health": (b"GET", False, self._answer_health),
            b"/live": (b"GET", False, lambda exchange: exchange.respond(200, b"{}")),
            b"/version": (b"GET", False, self._answer_version),
            b"/metrics": (b"GET", False, self._answer_metrics),
            b"/oserve/v1/status": (b"GET", True, partial(self._fresh, self._answer_status)),
            _SWITCHES: (b"GET", True, partial(self._fresh, self._answer_switches)),
            **dict.fromkeys(_OPERATED, (b"POST", True, self._answer_operator)),
            **dict.fromkeys(_GENERATE, (b"POST", True, self._generate)),
            **dict.fromkeys(_AUXILIARY, (b"POST", True, self._auxiliary)),
        }

    # -- life -----------------------------------------------------------------------------------
    async def listen(self) -> int:
        """Open the port; returns its number."""
        settings = self._settings
        self._server = await serve(
            self._handle,
            refuse=lambda exchange, status, message: send_error(
                exchange, with_status(status, message), close=True
            ),
            limits=ServerLimits(
                max_body_bytes=settings.max_body_bytes,
                max_connections=settings.max_connections,
                read_timeout_s=settings.read_timeout_s,
                stall_s=settings.stall_timeout_s,
            ),
            host=settings.host,
            port=settings.port,
            reuse_port=settings.processes > 1,
        )
        return self._server.port

    async def close(self) -> None:
        """Accept no new connections, drain within the grace period, then abort the remainder."""
        if self._server is not None:
            self._server.stop_listening()
        deadline_s = time.monotonic() + self._settings.shutdown_grace_s
        while self.runner.active and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.runner.close()
        if self._server is not None:
            await self._server.close()

    # -- requests -------------------------------------------------------------------------------
    def _handle(self, exchange: Exchange) -> None:
        """Handle one request; never raises."""
        request_id = (exchange.headers.get(b"x-request-id") or self._ids.take())[:_REQUEST_ID_BYTES]
        exchange.headers[b"x-request-id"] = request_id
        try:
            self._route(exchange)
        except ApiError as error:
            self._refuse(exchange, error)
        except Exception as error:  # see ``_later``
            self._failed(exchange, error)

    def _failed(self, exchange: Exchange, error: Exception) -> None:
        """End one request after a fault in the gateway."""
        request_id = exchange.headers[b"x-request-id"]
        _log.error("request %s failed in the gateway: %s", shown(request_id), fault(error))
        self._refuse(exchange, internal())

    def _route(self, exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        route = self._routes.get(_SWITCHES if path.startswith(_SWITCHES + b"/") else path)
        if path == b"*":
            exchange.respond(200, b"", headers=((b"allow", b"GET, HEAD, POST, OPTIONS"),))
            return
        if route is None:
            named = path[:64].decode("latin-1")
            raise with_status(404, f"There is no route {named} here", code="not_found")
        method, guarded, answer = route
        methods = (b"GET", b"HEAD") if method == b"GET" else (method,)
        if exchange.method not in methods:
            allow = ((b"allow", b", ".join((*methods, b"OPTIONS"))),)
            if exchange.method == b"OPTIONS":
                exchange.respond(200, b"", headers=allow)
                return
            names = " and ".join(name.decode() for name in methods)
            self._refuse(exchange, with_status(405, f"This route takes {names} only"), allow)
            return
        if guarded and self._keys and not self._authorised(exchange):
            raise with_status(401, "Missing or wrong API key", code="invalid_api_key")
        answer(exchange)

    def _refuse(
        self,
        exchange: Exchange,
        error: ApiError,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.runner.metrics.count("oserve_request_errors", error.code or error.type)
        request_id = exchange.headers[b"x-request-id"]
        send_error(exchange, error, (*headers, (b"x-request-id", request_id)))

    def _authorised(self, exchange: Exchange) -> bool:
        scheme, _, token = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(token.strip()).digest()
        return any([hmac.compare_digest(digest, key) for key in self._keys])  # noqa: C419

    def _generate(self, exchange: Exchange) -> None:
        parsed = self._parsed(exchange)
        size = prompt_size(parsed)
        prompt_tokens = self.runner.lengths.estimate(size)
        if not self.runner.table.length_classes:
            raise unavailable("No deployment plan is in force yet")
        estimate = self.runner.estimator.estimate(
            parsed,
            path=exchange.path.partition(b"?")[0],
            headers=exchange.headers,
            prompt_tokens=prompt_tokens,
            arrived_s=time.time(),
        )
        now_s = time.monotonic()
        request_id = exchange.headers[b"x-request-id"]
        session = Session(
            self.runner.context,
            exchange,
            number=self.runner.next_number(),
            request_id=request_id,
            parsed=parsed,
            request=Request(
                id=request_id.decode("latin-1"),
                arrival_s=now_s,
                workload_type=estimate.kind,
                prompt_tokens=prompt_tokens,
                output_tokens=estimate.output_tokens,
                probabilities=estimate.probabilities if self.runner.table.planned_types else (),
            ),
            estimate=estimate,
            prompt_size=size,
        )
        self.runner.accept(session, self._rank_s(exchange, parsed, now_s, prompt_tokens))

    def _rank_s(
        self, exchange: Exchange, parsed: GenerateBody, now_s: float, prompt_tokens: int
    ) -> float:
        return rank_s(
            (self.runner.table.constants or self._constants).order,
            arrival_s=now_s,
            prompt_tokens=prompt_tokens,
            client_priority=_priority(exchange, parsed),
        )

    def _parsed(self, exchange: Exchange) -> GenerateBody:
        """Validate content type and model of a request and return its body."""
        given = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if given != b"application/json":
            raise bad_request("The body must be JSON: send `Content-Type: application/json`")
        parsed = parse_body(exchange.body)
        self._check_model(parsed.model)
        return parsed

    def _check_model(self, model: str | None) -> None:
        # Like engines, accept a request without a model name.
        if model and model not in self._models:
            raise ApiError(
                status=404,
                message=f"The model `{model[:200]}` is not served here; "
                f"available: {', '.join(f'`{name}`' for name in self._models)}",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )

    def _auxiliary(self, exchange: Exchange) -> None:
        request_id = exchange.headers[b"x-request-id"]
        parsed = self._parsed(exchange)
        parsed.stream = False
        session = Session(
            self.runner.context,
            exchange,
            number=self.runner.next_number(),
            request_id=request_id,
            parsed=parsed,
        )
        self.runner.accept(session, 0.0)

    # -- routes of the gateway itself -----------------------------------------------------------
    def _answer_models(self, exchange: Exchange) -> None:
        lengths = [
            item.max_model_len for item in self.runner.serving.values() if item.max_model_len
        ]
        entries = [
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
        exchange.respond(200, msgspec.json.encode({"object": "list", "data": entries}))

    def _answer_health(self, exchange: Exchange) -> None:
        if self.runner.serving:
            exchange.respond(200, b"{}")
        else:
            send_error(exchange, unavailable("No replica can serve now"))

    def _answer_version(self, exchange: Exchange) -> None:
        exchange.respond(200, msgspec.json.encode({"version": __version__}))

    def _fresh(self, answer: Callable[[Exchange], None], exchange: Exchange) -> None:
        """Answer from a new snapshot, or from the last one while no control loop answers."""
        if self.refresh is None or (self.away_s is not None and self.away_s()):
            answer(exchange)
        else:
            self._later(exchange, self._refreshed(exchange, self.refresh, answer))

    async def _refreshed(
        self,
        exchange: Exchange,
        refresh: Callable[[], Awaitable[None]],
        answer: Callable[[Exchange], None],
    ) -> None:
        with contextlib.suppress(OSError):
            await refresh()
        answer(exchange)

    def _answer_status(self, exchange: Exchange) -> None:
        """The last status of the control loop, with its age if the loop is unreachable."""
        status = bytes(self.runner.snapshot.status)
        away_s = self.away_s() if self.away_s is not None else 0.0
        if away_s:
            status = msgspec.json.encode(
                {**msgspec.json.decode(status), "controller_away_s": round(away_s, 1)}
            )
        exchange.respond(200, status)

    def _answer_switches(self, exchange: Exchange) -> None:
        """All switches, or the one with the id in the path."""
        known = bytes(self.runner.snapshot.switches)
        path = exchange.path.partition(b"?")[0]
        if path == _SWITCHES:
            exchange.respond(200, b'{"switches":' + known + b"}")
            return
        wanted = path.removeprefix(_SWITCHES + b"/").decode("latin-1")
        for document in msgspec.json.decode(known):
            if document["id"] == wanted:
                exchange.respond(200, msgspec.json.encode(document))
                return
        raise with_status(404, f"There is no switch {wanted[:64]}", code="not_found")

    def _answer_metrics(self, exchange: Exchange) -> None:
        if self.refresh is None:
            self._expose(exchange)
        else:
            self._later(exchange, self._refresh_and_expose(exchange, self.refresh))

    def _later(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except ApiError as error:
                self._refuse(exchange, error)
            except Exception as error:  # an unforeseen fault ends this request alone
                self._failed(exchange, error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_operator(self, exchange: Exchange) -> None:
        if self.operate is None:
            raise unavailable("No control loop operates this gateway")
        self._later(exchange, self._operated(exchange, self.operate))

    async def _operated(
        self, exchange: Exchange, operate: Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
    ) -> None:
        try:
            path = exchange.path.partition(b"?")[0].decode("latin-1")
            status, body = await operate(path, exchange.body)
        except OSError:
            send_error(exchange, unavailable("The control loop is unreachable"))
        else:
            exchange.respond(status, body)

    async def _refresh_and_expose(
        self, exchange: Exchange, refresh: Callable[[], Awaitable[None]]
    ) -> None:
        """Any process may be scraped, so only fresh sums are monotonic."""
        try:
            await refresh()
        except OSError:
            if self._settings.processes > 1 or self._settings.placement != "server":
                raise unavailable("The counters of the other processes are unreachable") from None
        self._expose(exchange)

    def _expose(self, exchange: Exchange) -> None:
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
        gauges["oserve_controller_away_seconds"] = {(): away_s}
        alone = away_s > 0.0
        merged_metrics = {} if alone else runner.snapshot.metrics
        own = merged_metrics or runner.metrics.snapshot()
        text = exposition(merged([own, runner.snapshot.counters]), gauges)
        exchange.respond(200, text, content_type=b"text/plain; version=0.0.4; charset=utf-8")


def _priority(exchange: Exchange, parsed: GenerateBody) -> int:
    """The client's priority; as in vLLM, a numeric header overrides the body."""
    given = exchange.headers.get(_PRIORITY, b"")
    return int(given) if _INTEGER.fullmatch(given) else parsed.priority or 0
