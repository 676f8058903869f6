"""What gateways on every node of a large cluster cost the server: CPU and bytes of the hub.

    .venv/bin/python benchmarks/nodes/gateways.py [--nodes 128] [--replicas 4] [--seconds 20]

The server's own hub gets the reports of one gateway process per node, as often as they come
over the lines to the nodes, and answers them; the lines (TLS, sockets) are not part of it. Each
process has requests at some replicas, metrics in one report of ten, and documents every minute. The
table changes every five seconds, as routing shares do. Times are of one core.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import replace
from typing import Any

import msgspec

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.control.tally import Batch
from oserve.core import Endpoint, HatchAddress, LengthClass, ReplicaPhase
from oserve.gateway.metrics import Metrics
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_lines import framed
from oserve.gateway.process.messages import PROCESS_MESSAGES, WorkerReport
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.nodes.hatch_identity import make_identity

TABLE_S = 5
# Replicas at which one process has requests at a time.
BUSY = 24
STATUS_BYTES = 400_000


def table_of(nodes: int, per_node: int) -> RoutingTable:
    """Replicas on every node, with certificates of real size."""
    replicas = []
    for node in range(nodes):
        identity = make_identity(f"node{node}")
        hatch = HatchAddress(
            host=f"10.0.{node // 250}.{node % 250}",
            port=7443,
            certificate=identity.certificate,
            token=identity.token,
        )
        replicas += [
            TableReplica(
                id=f"r{node}-{number}",
                shape="tp2-bf16-2048",
                phase=ReplicaPhase.READY,
                endpoint=Endpoint(unix_socket=f"r{node}-{number}-1/api.sock", hatch=hatch),
                max_inflight=64,
                max_model_len=8192,
                accepts_priority=True,
                returns_token_ids=True,
                prefill_s_per_token=1e-4,
                decode_s_per_token=1e-3,
            )
            for number in range(per_node)
        ]
    share = {item.id: 1.0 / len(replicas) for item in replicas}
    return RoutingTable(
        plan_id="p",
        length_classes=(LengthClass(name="short", max_prompt_tokens=512), LengthClass(name="long")),
        routing_shares={"short": share, "long": share},
        replicas=tuple(replicas),
    )


def metrics_of(names: list[str]) -> dict[str, dict[str, list[float]]]:
    """As of a process that has served two types at these replicas."""
    metrics = Metrics()
    for name in names:
        for kind in ("short", "long"):
            metrics.count("oserve_route", kind, name)
    for kind in ("short", "long"):
        metrics.histogram("oserve_time_to_first_token_seconds", kind).observe(0.1)
        metrics.histogram("oserve_request_duration_seconds", kind).observe(1.0)
        metrics.histogram("oserve_queue_seconds", kind).observe(0.1)
    return metrics.snapshot()


def measured(nodes: int, per_node: int, seconds: int) -> dict[str, Any]:
    """CPU and bytes per second."""
    rng = random.Random(1)
    table = table_of(nodes, per_node)
    names = [item.id for item in table.replicas]
    clock = [0.0]
    hub = Hub(now=lambda: clock[0], unix=lambda: clock[0])
    metrics = metrics_of(names)
    status = msgspec.Raw(b'"' + b"x" * STATUS_BYTES + b'"')
    versions = [0] * nodes
    cpu_s, sent, received, lasted_s = 0.0, 0, 0, []
    # As ``HubClient.interval_s``.
    per_s = max(1, round(1.0 / max(0.1, 0.008 * (nodes + 1))))
    for step in range(seconds * per_s):
        clock[0] = step / per_s
        if step % (TABLE_S * per_s) == 0:
            hub.publish(replace(table, plan_id=f"p{step}"), ClusterSnapshot(status=status))
        for node in range(nodes):
            turn = step + node
            report = WorkerReport(
                incarnation=node + 1,
                counts=Batch(number=step, until_s=clock[0], names=("short", "long")),
                outstanding={
                    name: (rng.random(), 2) for name in rng.sample(names, min(BUSY, len(names)))
                },
                metrics=metrics if turn % 10 == 0 else None,
                queued=1,
                table=versions[node],
                sent_s=clock[0],
                port=8000,
                whole=turn % (60 * per_s) == 0,
                sums=False,
                keeps_hatches=True,
            )
            line = framed(step, msgspec.json.encode(report))
            began_s = time.process_time()
            message = PROCESS_MESSAGES.decode(line.partition(b" ")[2])
            assert isinstance(message, WorkerReport)
            reply = hub.reply(message, f"node{node}")
            answer = framed(step, msgspec.json.encode(reply))
            lasted_s.append(time.process_time() - began_s)
            cpu_s += lasted_s[-1]
            versions[node] = reply.version
            sent, received = sent + len(answer), received + len(line)
        hub.batches()
    lasted_s.sort()
    return {
        "nodes": nodes,
        "replicas": len(names),
        "cpu_cores": round(cpu_s / seconds, 3),
        "sent_mb_per_s": round(sent / seconds / 1e6, 2),
        "received_mb_per_s": round(received / seconds / 1e6, 2),
        "median_us": round(1e6 * lasted_s[len(lasted_s) // 2]),
        "p99_us": round(1e6 * lasted_s[int(0.99 * len(lasted_s))]),
        "table_kb": round(len(msgspec.json.encode(table)) / 1e3),
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=128)
    parser.add_argument("--replicas", type=int, default=4, help="on each node")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measured(given.nodes, given.replicas, given.seconds)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
