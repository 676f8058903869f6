"""Settings of the gateway."""

from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class OrderSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Order of waiting requests. ``policy``: ``priority`` (short first, with ageing) or ``fcfs``.

    ``penalty_s_per_1000_tokens``: the rank penalty of a prompt of 1,000 tokens, at most
    ``max_penalty_s``. ``freshest_first_s``: the window within which the latest arrival goes first.
    See ``control.dispatch.order``.
    """

    policy: Annotated[str, msgspec.Meta(pattern="^(priority|fcfs)$")] = "priority"
    penalty_s_per_1000_tokens: Annotated[float, msgspec.Meta(ge=0)] = 13.0
    max_penalty_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    freshest_first_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    client_step_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    max_client_steps: Annotated[int, msgspec.Meta(ge=0)] = 10


class OverloadSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Overload control. See ``control.dispatch.overload``.

    ``ttft_ms``: the wanted time to first token. With ``demote`` a waiting request that would miss
    it is served last, and a replica whose prompts owed exceed ``owed_of_ttft`` of it gets no more;
    unset: ``planning.slo_ttft_ms``. ``late_of_ttft``: the share of it after which a request that
    was not dispatched is late. ``shed_after_ms``: the waiting time after which a request is refused
    with 429 and Retry-After; unset: never.
    """

    demote: bool = True
    ttft_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    shed_after_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    owed_of_ttft: Annotated[float, msgspec.Meta(gt=0)] = 0.125
    late_of_ttft: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.75


class MoveSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Migration of running streams. See ``gateway.stream.migration``.

    ``max_moves`` bounds the migrations of one stream; 0: none. The replay buffers of a gateway
    process hold up to ``max_bytes``, that of one stream ``max_stream_bytes``; a longer stream
    cannot migrate. ``drain_limit_s``: how long a draining replica keeps streams that can migrate;
    unset: to their end.
    """

    max_moves: Annotated[int, msgspec.Meta(ge=0)] = 3
    max_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 * 1024 * 1024
    max_stream_bytes: Annotated[int, msgspec.Meta(ge=0)] = 8 * 1024 * 1024
    drain_limit_s: Annotated[float, msgspec.Meta(ge=0)] | None = 5.0


class TlsSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """TLS of the gateway's port: PEM files of the certificate (with its chain) and of its key.

    Both are read again when they change. Unset: plain HTTP.
    """

    certificate_file: str = ""
    key_file: str = ""


class TenantSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One tenant: its ``weight`` among others, and its limits; unset: none.

    Requests and tokens (of prompts and answers) a minute, over all tiers and processes; requests
    accepted and not ended; requests that wait.
    """

    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = None
    max_inflight: Count | None = None
    max_queued: Annotated[int, msgspec.Meta(ge=0)] | None = None


class TenancySettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Tenants, which API keys belong to. ``tenants`` by name; ``default``: all others.

    ``fair``: serve tenants of a tier by fair shares. ``locality_s``: device-seconds by which a
    tenant may go before its turn for a cached prefix. ``reserve``: the part of a replica's
    sequences that tenants with more than their share leave free while others are active.
    ``cache_salt``: share no cached prefixes between tenants.
    """

    fair: bool = True
    locality_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    reserve: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.03
    cache_salt: bool = False
    default: TenantSettings = TenantSettings()
    tenants: dict[str, TenantSettings] = {}

    def of(self, tenant: str) -> TenantSettings:
        """The settings of a tenant."""
        return self.tenants.get(tenant, self.default)


class TracingSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Spans of requests for OpenTelemetry (the extra ``otel``).

    ``otlp_endpoint``: of a collector, such as ``http://127.0.0.1:4318/v1/traces``; empty: none.
    ``sample``: the part of requests that is traced, if their client does not say.
    """

    otlp_endpoint: Annotated[str, msgspec.Meta(pattern=r"^(https?://\S+)?\Z")] = ""
    sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    service_name: str = "oserve"


class GatewaySettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The gateway.

    ``placement``: where gateway processes run: beside the server (``server``), or there and on
    every other node (``every-node``), ``processes`` at each place, all with this host and port.
    ``max_queued`` bounds the requests that wait because every replica is full; beyond it clients
    get 429. ``no_replica_wait_s``: how long a request waits for a replica that is starting before
    it gets 503. ``overflow_s``: expected work, in seconds, past which a request may leave its
    type's pool. ``inflight_per_device`` bounds the requests in flight at a replica; unset: twice
    its sequence limit.
    ``unix_socket``: the absolute path of a socket to listen on besides the port; unset: none. One
    process only. ``allowed_origins``: web pages whose scripts may call; see ``gateway.http.cors``.
    ``page_viewers``: how many may watch the page of one gateway process; 0: nobody.
    API keys come from ``oserve keys``, ``OSERVE_API_KEYS`` (comma-separated) or ``api_keys_file``
    (one a line; those of both are admins of the default tenant); without any the gateway is open.
    """

    placement: Annotated[str, msgspec.Meta(pattern="^(server|every-node)$")] = "server"
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    unix_socket: str = ""
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: Count = 16 * 1024 * 1024
    max_connections: Count = 10_000
    max_queued: Annotated[int, msgspec.Meta(ge=0)] = 4096
    max_attempts: Count = 3
    request_timeout_s: Positive = 600.0
    no_replica_wait_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    read_timeout_s: Positive = 60.0
    stall_timeout_s: Positive = 60.0
    shutdown_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    overflow_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    inflight_per_device: Annotated[float, msgspec.Meta(gt=0)] | None = None
    api_keys_file: str = ""
    tls: TlsSettings = TlsSettings()
    tenancy: TenancySettings = TenancySettings()
    tracing: TracingSettings = TracingSettings()
    order: OrderSettings = OrderSettings()
    overload: OverloadSettings = OverloadSettings()
    move: MoveSettings = MoveSettings()
    page_viewers: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 50
    records_file: str = ""
    max_records: Count = 1_000_000
