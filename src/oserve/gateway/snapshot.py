"""The cluster snapshot that a gateway process serves with."""

import msgspec

from oserve.gateway.access.limits import TenantLoad


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Status, switches, metrics and load of the cluster.

    ``elsewhere``: prior seconds of work and requests of other gateway processes, per replica.
    ``page``: the sections of the page, see ``look.sections``.
    ``counters``: those of the server itself, in the form of ``metrics``.
    ``metrics``: counters summed over all processes, this one included; empty if it is the only one.
    ``processes``: how many gateway processes there are; 0: as many as the settings say;
    ``position``: how many of them come before this one. ``tenants``: what they have elsewhere.
    ``hand_overs``: vacated replicas: when their engines started, and within how many seconds.
    """

    status: msgspec.Raw = msgspec.Raw(b"{}")
    gauges: list[tuple[str, list[str], float]] = []
    counters: dict[str, dict[str, list[float]]] = {}
    elsewhere: dict[str, tuple[float, int]] = {}
    metrics: dict[str, dict[str, list[float]]] = {}
    switches: msgspec.Raw = msgspec.Raw(b"[]")
    page: msgspec.Raw = msgspec.Raw(b"{}")
    queued: int = 0
    processes: int = 0
    hand_overs: dict[str, tuple[float, float]] = {}
    position: int = 0
    tenants: dict[str, TenantLoad] = {}
