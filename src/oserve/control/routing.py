"""The routing table of a plan on a cluster as observed."""

from collections.abc import Callable

from oserve.control.dispatch.constants import DispatchConstants, most_inflight
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    Tier,
)
from oserve.perf import TokenCosts, token_costs

# Few requests wait in an engine beyond its running batch, so that most wait in the gateway, which
# can choose among all replicas.
INFLIGHT_PER_SEQ = 2
# The engine begins its next step before the gateway receives the first tokens of the last one.
_STEPS_AHEAD = 2


def routing_table(
    plan: DeploymentPlan,
    observation: Observation,
    *,
    ordered: bool,
    expected: bool,
    costs: Callable[[ReplicaShape, str], TokenCosts] = token_costs,
    constants: DispatchConstants | None = None,
    tiers: tuple[Tier, ...] = (),
    default_tier: str = "",
) -> RoutingTable:
    """The table for a plan on a cluster as observed.

    ``ordered``: engines that OServe starts take priorities. ``expected``: see ``RoutingTable``.
    ``costs`` returns the costs of a shape on a kind of device. ``constants``: of dispatch; their
    bound on requests in flight does not apply to attached servers, whose devices are unknown. Nor
    is the precision of attached servers known, so none serves a tier that restricts it.
    """
    kinds = {device.id: device.kind for device in observation.devices}
    replicas = []
    for state in observation.replicas:
        if state.phase not in {ReplicaPhase.READY, ReplicaPhase.DRAINING}:
            continue
        spec = state.spec
        kind = kinds.get(spec.devices[0], "any") if spec.devices else "any"
        own = costs(spec.shape, kind)
        attached = spec.backend if isinstance(spec.backend, AttachedBackend) else None
        replicas.append(
            TableReplica(
                id=spec.id,
                shape=spec.shape.name,
                devices=1 if attached else spec.shape.device_count,
                phase=state.phase,
                endpoint=state.endpoint,
                max_inflight=most_inflight(
                    usual=INFLIGHT_PER_SEQ * spec.shape.max_num_seqs,
                    devices=spec.shape.device_count,
                    per_device=None
                    if attached or constants is None
                    else constants.inflight_per_device,
                ),
                max_model_len=state.max_model_len,
                accepts_priority=ordered and (attached is None or attached.priority),
                returns_token_ids=attached is None or attached.token_ids,
                prefill_s_per_token=own.prefill_s_per_token,
                decode_s_per_token=own.decode_s_per_token,
                kv_bytes_per_token=own.kv_bytes_per_token,
                step_tokens=_STEPS_AHEAD * spec.shape.step_tokens,
                model=attached.model if attached else "",
                attached=attached is not None,
                stream_options=attached is None or attached.stream_options,
                started_s=state.started_s,
                precision="" if attached else spec.shape.precision.value,
            )
        )
    return RoutingTable(
        plan_id=plan.id,
        length_classes=plan.length_classes,
        routing_shares=plan.routing_shares,
        replicas=tuple(replicas),
        expected=expected,
        planned_types=plan.planned_types,
        constants=constants,
        tiers=tiers,
        default_tier=default_tier,
    )
