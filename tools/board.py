"""Writes deploy/grafana/oserve.json: a board whose rows are questions.

python tools/board.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "deploy/grafana/oserve.json"
_WIDTH = 24
_RATE = "$__rate_interval"
_ENDED = 'oserve_requests_total{status!="disconnected"}'
_BAD = 'oserve_requests_total{status=~"failed|rejected"}'


def _quantile(metric: str, quantile: float, by: str = "workload_type") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({quantile}, sum by ({labels}) (rate({metric}_bucket[{_RATE}])))"


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}_total[{_RATE}]))"


# By row: a question. By panel: title, unit, what it tells, and legend and expression of each line.
Panel = tuple[str, str, str, dict[str, str]]
ROWS: dict[str, list[Panel]] = {
    "Is everything all right?": [
        (
            "Replicas by state",
            "short",
            "Loading and draining are part of every switch.",
            {"{{state}}": "sum by (state) (oserve_replicas)"},
        ),
        (
            "Requests that failed or were refused",
            "percentunit",
            "Of all that ended; clients that left do not count.",
            {
                "{{status}}": f"sum by (status) (rate({_BAD}[{_RATE}]))"
                f" / scalar(sum(rate({_ENDED}[{_RATE}])))"
            },
        ),
        (
            "Within the limits of the tier",
            "percentunit",
            "Share kept; without tiers in the settings it is empty.",
            {
                "{{tier}}": 'sum by (tier) (rate(oserve_tier_requests_total{outcome="kept"}'
                f"[{_RATE}])) / sum by (tier) (rate(oserve_tier_requests_total[{_RATE}]))"
            },
        ),
        (
            "Control loop away, engines silent",
            "s",
            "Requests are served on meanwhile; after 10 s of silence an engine is taken for hung.",
            {
                "controller": "max(oserve_controller_away_seconds)",
                "{{replica}}": "oserve_replica_silent_seconds > 1",
            },
        ),
    ],
    "How long do requests wait?": [
        (
            "Time to first token, P99",
            "s",
            "From arrival to the first byte of the answer, by type.",
            {"{{workload_type}}": _quantile("oserve_time_to_first_token_seconds", 0.99)},
        ),
        (
            "Time to first token, P50",
            "s",
            "The same for half of the requests.",
            {"{{workload_type}}": _quantile("oserve_time_to_first_token_seconds", 0.5)},
        ),
        (
            "Gap between tokens",
            "s",
            "Of all streams; a chunk holds one token or a few.",
            {
                "P99": _quantile("oserve_inter_token_latency_seconds", 0.99, ""),
                "P50": _quantile("oserve_inter_token_latency_seconds", 0.5, ""),
            },
        ),
        (
            "Whole answer, P99",
            "s",
            "From arrival to the last byte, by type.",
            {"{{workload_type}}": _quantile("oserve_request_duration_seconds", 0.99)},
        ),
    ],
    "Who waits, and for whom?": [
        (
            "Waiting requests",
            "short",
            "In the gateway (by rank) and in engines (for room in their batch).",
            {
                "gateway": "sum(oserve_requests_queued)",
                "{{replica}}": "oserve_requests_waiting",
            },
        ),
        (
            "Time in the gateway's queue, P99",
            "s",
            "By type.",
            {"{{workload_type}}": _quantile("oserve_queue_seconds", 0.99)},
        ),
        (
            "Served last, or not at all",
            "reqps",
            "Under overload, by what their tier says.",
            {
                "demoted": f"sum(rate(oserve_requests_demoted_total[{_RATE}]))",
                "shed": f"sum(rate(oserve_requests_shed_total[{_RATE}]))",
                "{{tenant}}, limit of {{limit}}": _rate("oserve_tenant_refused", "tenant, limit"),
            },
        ),
        (
            "Devices that tenants had",
            "short",
            "Device-seconds a second, as fair shares charge them.",
            {"{{tenant}}": _rate("oserve_tenant_device_seconds", "tenant")},
        ),
    ],
    "Where do requests go?": [
        (
            "Dispatched, by type and replica",
            "reqps",
            "Compare with the routing shares of the plan (oserve status).",
            {"{{workload_type}}: {{replica}}": _rate("oserve_route", "workload_type, replica")},
        ),
        (
            "Outside their pool",
            "reqps",
            "Because the replicas of the plan had no room, or could not be used.",
            {"{{reason}}": _rate("oserve_route_fallback", "reason")},
        ),
        (
            "Retried, moved",
            "reqps",
            "Retries are of replicas that failed; streams move when a replica fails or leaves.",
            {
                "retried, {{replica}}": _rate("oserve_requests_retried", "replica"),
                "moved, {{reason}} by {{way}}": _rate("oserve_requests_moved", "reason, way"),
            },
        ),
    ],
    "How full is the fleet?": [
        (
            "Requests in engines",
            "short",
            "Up to the sequence limit of the replica's shape.",
            {"{{replica}}": "oserve_requests_running"},
        ),
        (
            "KV cache",
            "percentunit",
            "A full one preempts requests.",
            {"{{replica}}": "oserve_kv_cache_usage_ratio"},
        ),
        (
            "Tokens",
            "short",
            "A second.",
            {
                "prompt, {{workload_type}}": _rate("oserve_prompt_tokens", "workload_type"),
                "output, {{workload_type}}": _rate("oserve_output_tokens", "workload_type"),
            },
        ),
    ],
    "What did it change?": [
        (
            "Replicas by shape",
            "short",
            "Those that serve.",
            {"{{shape}}": 'sum by (shape) (oserve_replicas{state="ready"})'},
        ),
        (
            "Switches that ended",
            "short",
            "oserve status and the log tell why, and what they were expected to bring.",
            {"{{state}}": "sum by (state) (increase(oserve_switches_total[15m]))"},
        ),
        (
            "Weights moved",
            "bytes",
            "Between devices, by switches that ended in the last 15 minutes.",
            {"bytes": "sum(increase(oserve_switch_moved_bytes_total[15m]))"},
        ),
        (
            "Nodes",
            "short",
            "Of a cluster of several.",
            {"{{state}}": "sum by (state) (oserve_nodes)"},
        ),
    ],
    "What does it cost?": [
        (
            "Power",
            "watt",
            "By state of the devices and by what measured it.",
            {"{{state}}, {{source}}": _rate("oserve_energy_joules", "state, source")},
        ),
        (
            "Energy per output token",
            "joule",
            "Of devices that serve, over five minutes.",
            {"joules": "max(oserve_joules_per_output_token)"},
        ),
        (
            "Devices",
            "short",
            "Used by a replica, or free.",
            {"{{state}}": "sum by (state) (oserve_devices)"},
        ),
    ],
}


def board() -> dict[str, Any]:
    """The board in Grafana's form."""
    panels: list[dict[str, Any]] = []
    top = 0
    for question, row in ROWS.items():
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": top}
        panels.append(
            {"type": "row", "title": question, "gridPos": place, "collapsed": False, "panels": []}
        )
        width = _WIDTH // len(row)
        panels += [
            _panel(panel, {"h": 8, "w": width, "x": index * width, "y": top + 1})
            for index, panel in enumerate(row)
        ]
        top += 9
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "oserve",
        "title": "OServe",
        "tags": ["oserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    title, unit, words, lines = panel
    return {
        "type": "timeseries",
        "title": title,
        "description": words,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "legendFormat": legend, "expr": expression}
            for index, (legend, expression) in enumerate(lines.items())
        ],
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare with the file")
    text = json.dumps(board(), indent=1) + "\n"
    if parser.parse_args().check:
        return int(not FILE.exists() or FILE.read_text() != text)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
