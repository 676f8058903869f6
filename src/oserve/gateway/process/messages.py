"""Messages between the hub and gateway processes.

A gateway process sends a ``ProcessMessage``; the hub answers with a ``HubMessage``. Both are JSON,
in one HTTP exchange over the hub's Unix socket.
"""

from typing import Any

import msgspec

from oserve.control.tally import Batch
from oserve.gateway.access.limits import TenantUse
from oserve.gateway.process.packed_table import PackedTable
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot

MESSAGE_PATH = b"/message"


class GatewayWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway process needs at its start: one JSON line on its standard input.

    ``hub`` is the path of the hub's Unix socket, ``keys_file`` that of the key file.
    ``estimator`` is the state of an ``OutputEstimator`` that has learned from earlier requests.
    """

    process: int
    hub: str
    models: tuple[str, ...]
    api_keys: list[str]
    keys_file: str
    settings: GatewaySettings
    estimator: dict[str, Any] | None = None


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """The state of one gateway process; the hub answers with a ``HubReply``.

    ``incarnation`` is the process id. ``counts`` are sent until the hub acknowledges them.
    ``outstanding``: seconds of work and requests per replica. ``table`` is the version of the
    routing table in use. ``port``: where the process listens, 0 before it does. ``open_breakers``:
    replicas whose circuit breaker is open, with the reason and the seconds left. ``whole``: the
    reply shall have the documents of the cluster, too. ``tenants``: what each used here so far;
    ``charged``: device-seconds by tier and tenant, joined by a tab.
    """

    incarnation: int
    counts: Batch
    outstanding: dict[str, tuple[float, int]]
    metrics: dict[str, dict[str, list[float]]]
    queued: int
    table: int
    port: int = 0
    open_breakers: dict[str, tuple[str, float]] = {}
    whole: bool = True
    tenants: dict[str, TenantUse] = {}
    charged: dict[str, float] = {}


class HubReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The state of the cluster for a gateway process.

    ``version`` is that of the current routing table; ``table`` is present only if the process has
    another version. ``counted`` is the number of the batch that the hub acknowledges. Unless it is
    ``whole``, the snapshot lacks what grows with the cluster: status, switches, gauges, counters.
    """

    version: int
    counted: int
    snapshot: ClusterSnapshot
    table: PackedTable | None = None
    whole: bool = True


class OperatorCall(msgspec.Struct, frozen=True, kw_only=True, tag="operator_call"):
    """An operator's HTTP call, passed on by the gateway process that received it.

    ``actor``: tenant and id of the key, for the audit log; ``source``: the caller's address.
    """

    path: str
    body: bytes
    actor: str = ""
    source: str = ""


class OperatorAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="operator_answer"):
    """The HTTP status and the JSON body that answer an ``OperatorCall``."""

    status: int
    body: bytes


ProcessMessage = WorkerReport | OperatorCall
HubMessage = HubReply | OperatorAnswer
