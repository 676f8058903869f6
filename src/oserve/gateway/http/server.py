"""The gateway's endpoints: authentication, its own routes, and admission of requests."""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from oserve.control.dispatch.order import rank_s
from oserve.control.dispatch.tiers import shift_s
from oserve.core import Caller, Request
from oserve.core.faults import fault
from oserve.gateway.access.door import OPEN_CALLER, Door
from oserve.gateway.access.port_tls import PortTls
from oserve.gateway.access.unix_port import (
    clear_unix_socket,
    open_to_all,
    remove_unix_socket,
)
from oserve.gateway.constants import constants_of
from oserve.gateway.http.api_form import AUXILIARY, FORMS, invoked_form
from oserve.gateway.http.body import SALT_FIELD, GenerateBody, gives_salt, parse_body
from oserve.gateway.http.cors import AllowedOrigins
from oserve.gateway.http.errors import (
    ApiError,
    bad_request,
    send_error,
    unavailable,
    with_status,
)
from oserve.gateway.http.own_routes import MODELS, SWITCHES, OwnRoutes
from oserve.gateway.http.page_routes import GatewayPageSource, page_routes
from oserve.gateway.http.prompt import prompt_size
from oserve.gateway.http.request_ids import RequestIds
from oserve.gateway.records import RecordSink
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.stream.session import Session
from oserve.gateway.tiers import promise_of
from oserve.look.feed import PageFeed
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.gateway")

_INVOCATIONS = b"/invocations"
_RESPONSES = b"/v1/responses/"
_OPERATED = {b"/oserve/v1/plan", b"/oserve/v1/switch", b"/oserve/v1/nodes"}
_METRICS = b"/metrics"
_REQUEST_ID_BYTES = 128
_PRIORITY = b"x-vllm-priority"
FOLLOW_INTERVAL_S = 0.5
"""How often key file and certificate are looked at: after twice this time a change is in force."""

_STRANGER = Caller(tenant="")
_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")


class Gateway(OwnRoutes):
    """One gateway process; see ``OwnRoutes`` for what the caller may set. ``door`` has the keys."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        models: tuple[str, ...],
        api_keys: frozenset[str] = frozenset(),
        keys_file: Path | None = None,
        records: RecordSink | None = None,
        estimator: OutputEstimator | None = None,
    ) -> None:
        super().__init__(settings, models=models, records=records, estimator=estimator)
        self.door = Door(api_keys, keys_file)
        self._servers: list[HttpServer] = []
        self._socket_file: tuple[int, int] | None = None
        self._origins = AllowedOrigins(settings.allowed_origins)
        self._ids = RequestIds()
        self._constants = constants_of(settings)
        self._tls = PortTls.of_settings(settings.tls)
        self._watch: asyncio.Task[None] | None = None
        self.feed = PageFeed(GatewayPageSource(self), most_viewers=settings.page_viewers)
        fresh = self.fresh
        self._routes: dict[bytes, tuple[bytes, bool, Callable[[Exchange, Caller], None]]] = {
            MODELS: (b"GET", True, self.answer_models),
            b"/health": (b"GET", False, self.answer_health),
            b"/live": (b"GET", False, lambda exchange, _: exchange.respond(200, b"{}")),
            b"/ping": (b"GET", False, self.answer_health),
            b"/version": (b"GET", False, self.answer_version),
            b"/load": (b"GET", True, self.answer_load),
            b"/openapi.json": (b"GET", False, self.answer_openapi),
            _METRICS: (b"GET", False, self.answer_metrics),
            b"/oserve/v1/status": (b"GET", True, fresh(self.answer_status)),
            SWITCHES: (b"GET", True, fresh(self.answer_switches)),
            **page_routes(self, self.feed),
            **dict.fromkeys(_OPERATED, (b"POST", True, self.answer_operator)),
            **dict.fromkeys((*FORMS, _INVOCATIONS), (b"POST", True, self._generate)),
            **dict.fromkeys(AUXILIARY, (b"POST", True, self._auxiliary)),
        }

    # -- life -----------------------------------------------------------------------------------
    async def listen(self) -> int:
        """Open the port, and the Unix socket if there is to be one; returns the port's number."""
        settings = self._settings
        opened = partial(
            serve,
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
        )
        if settings.unix_socket:
            clear_unix_socket(settings.unix_socket)
        port = await opened(
            host=settings.host,
            port=settings.port,
            reuse_port=settings.processes > 1,
            tls=None if self._tls is None else self._tls.context,
        )
        self._servers.append(port)
        if settings.unix_socket:
            self._servers.append(await opened(unix_socket=settings.unix_socket))
            self._socket_file = open_to_all(settings.unix_socket)
        self._watch = asyncio.ensure_future(self._follow_files())
        # From every node of a large cluster it would be too much.
        if settings.page_viewers and settings.placement == "server":
            self.feed.remember()
        return port.port

    async def _follow_files(self) -> None:
        """Use changed keys and certificates from ``FOLLOW_INTERVAL_S`` on."""
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            try:
                self.door.check()
                if self._tls is not None:
                    self._tls.check()
            except Exception as error:  # what was read before stays in force
                _log.error("keys or certificate could not be read again: %s", fault(error))

    async def close(self) -> None:
        """Accept no new connections, drain within the grace period, then abort the remainder."""
        if self._watch is not None:
            self._watch.cancel()
        if self._socket_file is not None:
            remove_unix_socket(self._settings.unix_socket, self._socket_file)
        for server in self._servers:
            server.stop_listening()
        deadline_s = time.monotonic() + self._settings.shutdown_grace_s
        while self.runner.active and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.feed.close()
        self.runner.close()
        for server in self._servers:
            await server.close()

    # -- requests -------------------------------------------------------------------------------
    def _handle(self, exchange: Exchange) -> None:
        """Handle one request; never raises."""
        request_id = (exchange.headers.get(b"x-request-id") or self._ids.take())[:_REQUEST_ID_BYTES]
        exchange.headers[b"x-request-id"] = request_id
        exchange.added = self._origins.fields(exchange.headers)
        try:
            self._route(exchange)
        except ApiError as error:
            self.refuse(exchange, error)
        except Exception as error:  # see ``_later``
            self.failed(exchange, error)

    def _route(self, exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        parent = next((item for item in (SWITCHES, MODELS) if path.startswith(item + b"/")), path)
        route = self._routes.get(parent)
        if path == b"*":
            exchange.respond(200, b"", headers=((b"allow", b"GET, HEAD, POST, OPTIONS"),))
            return
        if path.startswith(_RESPONSES):
            message = "Responses are not stored here: send the conversation with each request"
            raise with_status(404, message, code="response_not_found")
        if route is None:
            named = path[:64].decode("latin-1")
            raise with_status(404, f"There is no route {named} here", code="not_found")
        method, guarded, answer = route
        methods = (b"GET", b"HEAD") if method == b"GET" else (method,)
        if exchange.method not in methods:
            allow = ((b"allow", b", ".join((*methods, b"OPTIONS"))),)
            if exchange.method == b"OPTIONS":
                leave = self._origins.preflight(exchange.headers, methods)
                exchange.respond(200, b"", headers=(*allow, *leave))
                return
            names = " and ".join(name.decode() for name in methods)
            self.refuse(exchange, with_status(405, f"This route takes {names} only"), allow)
            return
        if guarded:
            caller = self.door.caller(_credentials(exchange), exchange.peer)
        else:
            caller = self._caller(exchange)
        answer(exchange, caller)

    def _caller(self, exchange: Exchange) -> Caller:
        """Who calls a route that needs no key; a key shows an admin more of the metrics."""
        if not self.door.guarded:
            return OPEN_CALLER
        given = _credentials(exchange)
        if not given or not exchange.path.startswith(_METRICS):
            return _STRANGER
        return self.door.caller(given, exchange.peer)

    def _generate(self, exchange: Exchange, caller: Caller) -> None:
        parsed = self._parsed(exchange)
        size = prompt_size(parsed)
        prompt_tokens = self.runner.lengths.estimate(size)
        if not self.runner.table.length_classes:
            raise unavailable("No deployment plan is in force yet")
        promise = promise_of(self.runner.table, caller, exchange.headers, parsed)
        estimate = self.runner.estimator.estimate(
            parsed,
            tier=promise.tier.name if promise is not None else "",
            path=parsed.form.path,
            headers=exchange.headers,
            prompt_tokens=prompt_tokens,
            arrived_s=time.time(),
        )
        now_s, request_id = time.monotonic(), exchange.headers[b"x-request-id"]
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
                promise=promise,
            ),
            estimate=estimate,
            prompt_size=size,
        )
        if caller.key and self._settings.tenancy.cache_salt:
            own = bytes(parsed.fields[SALT_FIELD]) if gives_salt(parsed) else b""
            session.cache_salt = self.door.cache_salt(caller.tenant, own)
        # Without keys there are no tenants.
        session.tenant = caller.tenant if caller.key else ""
        order = (self.runner.table.constants or self._constants).order
        priority = _priority(exchange, parsed)
        rank = rank_s(order, arrival_s=now_s, prompt_tokens=prompt_tokens, client_priority=priority)
        self.runner.accept(session, rank + shift_s(order, promise, estimate.output_tokens))

    def _parsed(self, exchange: Exchange) -> GenerateBody:
        """Validate content type and model of a request and return its body."""
        path = exchange.path.partition(b"?")[0]

        given = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if given != b"application/json":
            raise bad_request("The body must be JSON: send `Content-Type: application/json`")
        form = FORMS.get(path) or AUXILIARY.get(path)
        if form is None:
            form = invoked_form(set(parse_body(exchange.body).fields))
        parsed = parse_body(exchange.body, form)
        self._check_model(parsed.model)
        return parsed

    def _check_model(self, model: str | None) -> None:
        # Like engines, accept a request without a model name.
        if model and model not in self._models:
            raise self.no_model(model)

    def _auxiliary(self, exchange: Exchange, caller: Caller) -> None:
        request_id = exchange.headers[b"x-request-id"]
        parsed = self._parsed(exchange)
        session = Session(
            self.runner.context,
            exchange,
            number=self.runner.next_number(),
            request_id=request_id,
            parsed=parsed,
        )
        session.tenant = caller.tenant if caller.key else ""
        self.runner.accept(session, 0.0)


def _credentials(exchange: Exchange) -> bytes:
    """The Authorization header; clients of Anthropic's API send the bare key in ``x-api-key``."""
    key = exchange.headers.get(b"x-api-key")
    given = exchange.headers.get(b"authorization", b"")
    return b"Bearer " + key if key and not given else given


def _priority(exchange: Exchange, parsed: GenerateBody) -> int:
    """The client's priority; as in vLLM, a numeric header overrides the body."""
    given = exchange.headers.get(_PRIORITY, b"")
    return int(given) if _INTEGER.fullmatch(given) else parsed.priority or 0
