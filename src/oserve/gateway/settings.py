"""Settings of the gateway."""

from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class OrderSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Order of waiting requests. ``policy``: ``priority`` (short first, with ageing) or ``fcfs``.

    ``penalty_s_per_1000_tokens``: how much later a prompt of 1,000 tokens may be served than an
    empty one that arrived with it, at most ``max_penalty_s``. ``freshest_first_s``: within windows
    of so many seconds the latest arrival goes first. See control.order.
    """

    policy: Annotated[str, msgspec.Meta(pattern="^(priority|fcfs)$")] = "priority"
    penalty_s_per_1000_tokens: Annotated[float, msgspec.Meta(ge=0)] = 13.0
    max_penalty_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    freshest_first_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    client_step_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    max_client_steps: Annotated[int, msgspec.Meta(ge=0)] = 10


class OverloadSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When more comes than can be served. See control.overload.

    ``ttft_ms``: a waiting request that would get its first token later than this is served last,
    and replicas that owe prompts for an eighth of it get no more (``demote``); unset:
    ``planning.slo_ttft_ms``. ``shed_after_ms``: one that has waited so long is
    refused with 429 and Retry-After; unset: never.
    """

    demote: bool = True
    ttft_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    shed_after_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None


class MoveSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When a running stream goes on at another replica. See gateway.moving.

    ``max_moves`` of one request; 0: none moves. ``max_bytes`` of running answers are kept in each
    gateway process for that, ``max_stream_bytes`` of one; what is longer does not move.
    ``drain_limit_s``: how long a draining replica keeps those that can move; unset: to the end.
    """

    max_moves: Annotated[int, msgspec.Meta(ge=0)] = 3
    max_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 * 1024 * 1024
    max_stream_bytes: Annotated[int, msgspec.Meta(ge=0)] = 8 * 1024 * 1024
    drain_limit_s: Annotated[float, msgspec.Meta(ge=0)] | None = 5.0


class GatewaySettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The HTTP front.

    ``max_queued`` bounds requests that wait because every replica is full; past it clients get 429.
    ``no_replica_wait_s``: how long a request waits for a replica that is on its way before 503.
    ``overflow_s``: expected work, in seconds, past which a request may leave its type's pool.
    API keys come from ``OSERVE_API_KEYS`` (comma-separated) or ``api_keys_file`` (one a line);
    without any the gateway is open.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
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
    api_keys_file: str = ""
    order: OrderSettings = OrderSettings()
    overload: OverloadSettings = OverloadSettings()
    move: MoveSettings = MoveSettings()
    records_file: str = ""
    max_records: Count = 1_000_000
