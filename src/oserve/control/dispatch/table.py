"""The routing table: all that the request path needs of plan and cluster, in one value.

The gateway replaces the whole value, so a change of deployment is atomic for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from oserve.control.dispatch.constants import DispatchConstants
from oserve.core import Endpoint, LengthClass, PlannedType, ReplicaPhase, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReplica:
    """A replica that the gateway can reach; only replicas in phase ready get new requests.

    ``precision``: of its weights; "" where that is unknown, as for attached servers.
    ``returns_token_ids``: it accepts vLLM's ``return_token_ids``. ``stream_options``: it accepts
    OpenAI's field of that name. ``attached``: others run it. ``devices``: how many it runs on.
    ``started_s``: when its engine started.
    """

    id: str
    shape: str
    phase: ReplicaPhase
    endpoint: Endpoint
    max_inflight: int
    max_model_len: int
    accepts_priority: bool
    returns_token_ids: bool
    prefill_s_per_token: float
    decode_s_per_token: float
    step_tokens: int = 0
    kv_bytes_per_token: float = 0.0
    model: str = ""
    attached: bool = False
    stream_options: bool = True
    started_s: float = 0.0
    precision: str = ""
    devices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """``expected``: a replica that cannot serve now is starting.

    ``planned_types`` have their own shares; where they exist, requests are routed by them.
    ``constants``: of dispatch, in place of those that the gateway's settings give. ``tiers``: what
    requests may ask for; ``default_tier``: of those that ask for none, "" without tiers.
    """

    plan_id: str
    length_classes: tuple[LengthClass, ...]
    routing_shares: Mapping[str, Mapping[str, float]]
    replicas: tuple[TableReplica, ...]
    expected: bool = True
    planned_types: tuple[PlannedType, ...] = ()
    constants: DispatchConstants | None = None
    tiers: tuple[Tier, ...] = ()
    default_tier: str = ""


EMPTY_TABLE = RoutingTable(plan_id="", length_classes=(), routing_shares={}, replicas=())
"""The routing table before the first plan."""
