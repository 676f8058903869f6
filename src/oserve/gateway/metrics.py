"""Counters of the request path: cheap to increment, mergeable over processes, for Prometheus.

Every chunk of every stream is timed, so counters and histograms are plain numbers, rendered only
when they are scraped. A caller may keep a ``Counter`` or ``Histogram``.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Labels = tuple[str, ...]

_STATES: Labels = ("node", "state")

COUNTERS: dict[str, tuple[str, Labels]] = {
    "oserve_requests": ("Ended requests by status.", ("status",)),
    "oserve_request_errors": ("Error responses by reason.", ("reason",)),
    "oserve_requests_retried": ("Retries by the replica that failed.", ("replica",)),
    "oserve_requests_moved": ("Streams that migrated to another replica.", ("reason", "way")),
    "oserve_route": ("Requests dispatched by type and replica.", ("workload_type", "replica")),
    "oserve_route_fallback": ("Requests dispatched outside their pool, by reason.", ("reason",)),
    "oserve_requests_demoted": ("Waiting requests that can no longer meet their TTFT.", ()),
    "oserve_requests_shed": ("Waiting requests shed under overload.", ()),
    "oserve_tier_requests": (
        "Ended requests by tier: kept within its limits, missed, or not served.",
        ("tier", "outcome"),
    ),
    "oserve_requests_outgrown": ("Answers longer than expected.", ()),
    "oserve_route_cached": ("Requests dispatched to a replica with a cached prefix.", ()),
    "oserve_prompt_tokens": ("Prompt tokens of finished requests.", ("workload_type",)),
    "oserve_output_tokens": ("Output tokens of finished requests.", ("workload_type",)),
    "oserve_energy_joules": (
        "Joules of devices with a replica (serving) and without (idle).",
        ("source", "state"),
    ),
    "oserve_switches": ("Switches of this server by how they ended.", ("state",)),
    "oserve_switch_moved_bytes": ("Bytes of weights that ended switches moved.", ()),
    "oserve_tenant_requests": ("Ended requests by tenant and status.", ("tenant", "status")),
    "oserve_tenant_prompt_tokens": ("Prompt tokens of finished requests.", ("tenant",)),
    "oserve_tenant_output_tokens": ("Output tokens of finished requests.", ("tenant",)),
    "oserve_tenant_device_seconds": ("Device-seconds charged by fair shares.", ("tenant",)),
    "oserve_tenant_refused": ("Requests refused by a limit of their tenant.", ("tenant", "limit")),
    "oserve_records_dropped": ("Request records dropped because the backlog was full.", ()),
}
HISTOGRAMS: dict[str, tuple[str, Labels]] = {
    "oserve_time_to_first_token_seconds": ("Arrival to first byte.", ("workload_type",)),
    "oserve_inter_token_latency_seconds": ("Gap between chunks of a stream.", ()),
    "oserve_request_duration_seconds": ("Arrival to last byte.", ("workload_type",)),
    "oserve_queue_seconds": ("Arrival to dispatch.", ("workload_type",)),
}
GAUGES: dict[str, tuple[str, Labels]] = {
    "oserve_requests_inflight": ("Requests dispatched and not ended.", ("replica",)),
    "oserve_requests_queued": ("Requests waiting in the gateway.", ()),
    "oserve_replicas": ("Replicas, by shape and phase.", ("shape", "state")),
    "oserve_devices": ("Devices, used by a replica or free.", ("state",)),
    "oserve_nodes": ("Nodes of a cluster of several, by state.", ("state",)),
    "oserve_gateways": ("Gateway processes by node, empty: the server's, and state.", _STATES),
    "oserve_gateway_requests": ("Requests in a node's gateway processes.", ("node",)),
    "oserve_controller_away_seconds": ("How long the control loop has been out of reach.", ()),
    "oserve_requests_running": ("Requests that an engine is computing.", ("replica",)),
    "oserve_requests_waiting": ("Requests that wait in an engine.", ("replica",)),
    "oserve_kv_cache_usage_ratio": ("Used fraction of an engine's KV cache.", ("replica",)),
    "oserve_joules_per_output_token": ("Joules of serving devices per token, recently.", ()),
    "oserve_replica_silent_seconds": ("Time since an engine's last sign of life.", ("replica",)),
}


BY_TENANT = frozenset(
    name
    for table in (COUNTERS, HISTOGRAMS, GAUGES)
    for name, (_, labels) in table.items()
    if "tenant" in labels
)
"""Metrics that would tell one tenant about others."""


class Counter:
    """One number; the hot path adds to ``value``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """Bucket counts and a sum; ``observe`` is the hot path."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds


class Metrics:
    """All counters and histograms of one process."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, Counter]] = {name: {} for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self.inter_token = self.histogram("oserve_inter_token_latency_seconds")

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Increment a counter. Labels are few by construction: types, replicas, reasons."""
        found = self._counters[name].get(labels)
        (self.counter(name, *labels) if found is None else found).value += by

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter of these labels, created at first use."""
        found = self._counters[name].get(labels)
        if found is None:
            found = self._counters[name][labels] = Counter()
        return found

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram of these labels, created at first use."""
        found = self._histograms[name].get(labels)
        if found is None:
            found = self._histograms[name][labels] = Histogram()
        return found

    def snapshot(self) -> dict[str, dict[str, list[float]]]:
        """All metrics as plain data: name -> tab-joined labels -> numbers (sum last)."""
        plain: dict[str, dict[str, list[float]]] = {}
        for name, values in self._counters.items():
            plain[name] = {"\t".join(labels): [item.value] for labels, item in values.items()}
        for name, histograms in self._histograms.items():
            plain[name] = {
                "\t".join(labels): [*histogram.counts, histogram.sum]
                for labels, histogram in histograms.items()
            }
        return plain


def merged(
    snapshots: Iterable[Mapping[str, Mapping[str, list[float]]]],
) -> dict[str, dict[str, list[float]]]:
    """The sum of several snapshots."""
    total: dict[str, dict[str, list[float]]] = {}
    for snapshot in snapshots:
        for name, series in snapshot.items():
            into = total.setdefault(name, {})
            for labels, numbers in series.items():
                old = into.get(labels)
                into[labels] = (
                    list(numbers)
                    if old is None
                    else [a + b for a, b in zip(old, numbers, strict=True)]
                )
    return total


GaugeValues = Mapping[str, Mapping[Labels, float]]


class _Exposition:
    """Adapts plain numbers to prometheus_client's metric families."""

    def __init__(
        self,
        snapshot: Mapping[str, Mapping[str, list[float]]],
        gauges: GaugeValues,
        without: Collection[str],
    ) -> None:
        self._snapshot = snapshot
        self._gauges = gauges
        self._without = without

    def collect(self) -> Iterator[Metric]:
        for name, (text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for key, numbers in self._series(name).items():
                counter.add_metric(_split(key, labels), numbers[0])
            yield counter
        for name, (text, labels) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(name, text, labels=labels)
            for key, numbers in self._series(name).items():
                buckets: list[tuple[str, float]] = []
                running = 0.0
                for bound, value in zip([*map(str, _SECONDS), "+Inf"], numbers, strict=False):
                    running += value
                    buckets.append((bound, running))
                histogram.add_metric(_split(key, labels), buckets, numbers[-1])
            yield histogram
        for name, (text, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            shown = {} if name in self._without else self._gauges.get(name, {})
            for key_labels, value in shown.items():
                gauge.add_metric(key_labels, value)
            yield gauge

    def _series(self, name: str) -> Mapping[str, list[float]]:
        return {} if name in self._without else self._snapshot.get(name, {})


def _split(key: str, labels: Labels) -> list[str]:
    return key.split("\t") if labels else []


def exposition(
    snapshot: Mapping[str, Mapping[str, list[float]]],
    gauges: GaugeValues,
    *,
    without: Collection[str] = (),
) -> bytes:
    """All metrics in Prometheus' text format; those named in ``without`` are empty."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Exposition(snapshot, gauges, without))
    return generate_latest(registry)
