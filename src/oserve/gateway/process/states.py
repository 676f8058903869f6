"""The state of each gateway process, for status and metrics."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import msgspec

from oserve.gateway.process.reports import STALE_S, ProcessView


class GatewayState(StrEnum):
    """``starting`` until it listens; ``away``: it does not report, or its node is lost.

    ``failing``: it ended, or could not start, and is started again after a pause. ``leaving``: its
    node is being drained.
    """

    STARTING = "starting"
    SERVING = "serving"
    AWAY = "away"
    FAILING = "failing"
    LEAVING = "leaving"


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway process. ``node`` is empty beside the server. ``report_age_s``: of its last one.

    ``inflight``: requests at replicas; ``queued``: requests that wait in it.
    """

    node: str
    process: int
    state: GatewayState
    port: int = 0
    inflight: int = 0
    queued: int = 0
    report_age_s: float | None = None
    reason: str = ""


def status_of(
    node: str, process: int, state: GatewayState, view: ProcessView | None, reason: str = ""
) -> GatewayStatus:
    """What is told of a process. One that serves, but has fallen silent, is away."""
    if view is None:
        return GatewayStatus(node=node, process=process, state=state, reason=reason)
    if state is GatewayState.SERVING and view.age_s > STALE_S:
        state, reason = GatewayState.AWAY, reason or "it does not report"
    return GatewayStatus(
        node=node,
        process=process,
        state=state,
        port=view.port,
        inflight=view.inflight,
        queued=view.queued,
        report_age_s=round(view.age_s, 2),
        reason=reason,
    )


Gauges = list[tuple[str, list[str], float]]


def gateway_gauges(found: Iterable[GatewayStatus]) -> Gauges:
    """Processes by node and state, and requests by node."""
    processes: Counter[tuple[str, str]] = Counter()
    requests: Counter[str] = Counter()
    for one in found:
        processes[one.node, one.state.value] += 1
        requests[one.node] += one.inflight + one.queued
    return [
        *(("oserve_gateways", [*key], float(n)) for key, n in processes.items()),
        *(("oserve_gateway_requests", [node], float(n)) for node, n in requests.items()),
    ]


def gateway_documents(found: Iterable[GatewayStatus]) -> list[dict[str, Any]]:
    """JSON values for the status document."""
    return [msgspec.to_builtins(one) for one in found]
