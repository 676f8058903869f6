"""Messages between the hub and gateway processes.

A gateway process sends a ``ProcessMessage``; the hub answers with a ``HubMessage``. Both are JSON:
in one HTTP exchange over the hub's Unix socket, or in lines with a process on another node, which
the hub calls through the node's hatch (``hub_lines``).
"""

from typing import Any

import msgspec

from oserve.control.tally import Batch
from oserve.core import HatchAddress, RequestRecord
from oserve.gateway.access.keys import KeyDocument
from oserve.gateway.access.limits import TenantLoad
from oserve.gateway.process.packed_table import PackedTable
from oserve.gateway.process.spending import Spending
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot

MESSAGE_PATH = b"/message"


class GatewayHome(msgspec.Struct, frozen=True, kw_only=True):
    """The other node that a gateway process runs on.

    ``folder``: its private folder, where its engines' sockets are. ``certificate``: of its hatch
    (PEM), by which the process knows which endpoints are its own node's. ``alone_s``: how long it
    serves without the hub, before it ends.
    """

    node: str
    folder: str
    certificate: str
    alone_s: float


class GatewayWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway process needs at its start: one JSON line on its standard input.

    ``hub`` is the path of the hub's Unix socket; with a ``home``, of the socket where this process
    listens for the hub. ``keys_file``: path of the key file; on another node, where there is none,
    the hub sends the keys. ``incarnation``: see ``WorkerReport``; 0: the process id. ``estimator``
    is the state of an ``OutputEstimator`` that has learned from earlier requests.
    """

    process: int
    hub: str
    models: tuple[str, ...]
    api_keys: list[str]
    keys_file: str = ""
    settings: GatewaySettings
    home: GatewayHome | None = None
    incarnation: int = 0
    estimator: dict[str, Any] | None = None


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """The state of one gateway process; the hub answers with a ``HubReply``.

    ``incarnation`` is the process id, or on another node a random number. ``counts`` are sent until
    the hub acknowledges them, and so are ``records``, the first of which has the number
    ``first_record``. ``outstanding``: seconds of work and requests per replica that has any.
    ``metrics``: unset in reports between those that have them. ``sent_s``: Unix time. ``table`` is
    the version of the routing table in use. ``port``: where the process listens, 0 before it does.
    ``open_breakers``: replicas whose circuit breaker is open, with the reason and the seconds left.
    ``whole``: the reply shall have the documents of the cluster, too; ``sums``: those of metrics.
    ``keeps_hatches``: the process knows those of the table in use, and needs only what it lacks.
    ``tenants``: what each has here now; ``spent``: what they spent anew, sent until the hub names
    its number, as the process does with ``heard``. ``keys``: of a process that takes keys from the
    hub, the version of those that it has.
    """

    incarnation: int
    counts: Batch
    outstanding: dict[str, tuple[float, int]]
    metrics: dict[str, dict[str, list[float]]] | None
    queued: int
    table: int
    sent_s: float = 0.0
    port: int = 0
    open_breakers: dict[str, tuple[str, float]] = {}
    first_record: int = 0
    records: list[RequestRecord] = []
    whole: bool = True
    sums: bool = True
    keeps_hatches: bool = False
    tenants: dict[str, TenantLoad] = {}
    spent: Spending = Spending()
    heard: int = 0
    keys: str | None = None


class HubReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The state of the cluster for a gateway process.

    ``version`` is that of the current routing table; ``table`` is present only if the process has
    another version; for one that takes tables so, ``sent_table`` and ``hatches`` (``sent_table``).
    ``counted`` is the number of the batch that the hub acknowledges, ``recorded`` that of the next
    record that it needs, ``spent`` that of the spending. ``spending``: what tenants spent anew in
    other processes. Unless it is ``whole``, the snapshot lacks what grows with the
    cluster: status, switches, gauges, counters. Sums of metrics come if they are asked for.
    ``keys``: if others than those that the process has are in force, with ``keys_version``.
    """

    version: int
    counted: int
    recorded: int = 0
    snapshot: ClusterSnapshot
    table: PackedTable | None = None
    sent_table: bytes = b""
    hatches: dict[str, HatchAddress] = {}
    whole: bool = True
    spent: int = 0
    spending: Spending = Spending()
    keys: KeyDocument | None = None
    keys_version: str = ""


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

PROCESS_MESSAGES: msgspec.json.Decoder[ProcessMessage] = msgspec.json.Decoder(ProcessMessage)
