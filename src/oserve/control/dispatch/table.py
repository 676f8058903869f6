"""The routing table: all that the request path needs of plan and cluster, as one value.

It is replaced whole, so a change of deployment is one atomic step for the gateway.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import Endpoint, LengthClass, PlannedType, ReplicaPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReplica:
    """A replica the gateway may talk to; only those in phase ready are given new requests.

    ``tells_token_ids``: it takes vLLM's ``return_token_ids``; ``stream_options``: OpenAI's field of
    that name. ``attached``: others run it. ``started_s``: of its engine.
    """

    id: str
    shape: str
    phase: ReplicaPhase
    endpoint: Endpoint
    max_inflight: int
    max_model_len: int
    accepts_priority: bool
    tells_token_ids: bool
    prefill_s_per_token: float
    decode_s_per_token: float
    step_tokens: int = 0
    kv_bytes_per_token: float = 0.0
    model: str = ""
    attached: bool = False
    stream_options: bool = True
    started_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """``expected`` says whether a replica that cannot serve now is on its way.

    ``planned_types`` have shares of their own; where there are any, requests are routed by these.
    """

    plan_id: str
    length_classes: tuple[LengthClass, ...]
    routing_shares: Mapping[str, Mapping[str, float]]
    replicas: tuple[TableReplica, ...]
    expected: bool = True
    planned_types: tuple[PlannedType, ...] = ()


EMPTY_TABLE = RoutingTable(plan_id="", length_classes=(), routing_shares={}, replicas=())
"""Before there is a plan."""
