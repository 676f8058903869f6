"""The document that tells people what a switch would do."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from oserve.switch.programme import ProgrammeStep, SwitchProgramme


def programme_document(programme: SwitchProgramme, running: Mapping[str, int]) -> dict[str, Any]:
    """Return JSON values; ``running``: requests on each replica now."""
    leaving = {name for step in programme.steps for name in step.wave.leaving}
    return {
        "kept": list(programme.order.kept),
        "floor_share": min(1.0, programme.order.floor_share),
        "reason": programme.order.reason,
        "waves": [_wave(step) for step in programme.steps],
        "between_nodes": [
            {"source": source, "target": target, "bytes": size}
            for (source, target), size in sorted(_between_nodes(programme).items())
        ],
        "ready_s": round(programme.cost.ready_s, 2),
        "total_s": round(programme.cost.total_s, 2),
        "requests_running_on_leaving": sum(running.get(name, 0) for name in leaving),
    }


def between_nodes_line(document: Mapping[str, Any]) -> str:
    """The bytes that a programme's document plans between nodes, as words; empty for none."""
    return ", ".join(
        f"{link['source']} -> {link['target']}: {link['bytes']:,} bytes"
        for link in document.get("between_nodes", ())
    )


def _between_nodes(programme: SwitchProgramme) -> Counter[tuple[str, str]]:
    """Bytes of all waves by (node, other node)."""
    nodes = programme.nodes
    sums: Counter[tuple[str, str]] = Counter()
    for step in programme.steps:
        for pair, size in step.transfer.traffic.pairs.items():
            source, target = (nodes.get(device, "") for device in pair)
            if source != target:
                sums[source, target] += size
    return sums


def _wave(step: ProgrammeStep) -> dict[str, Any]:
    traffic = step.transfer.traffic
    predicted = step.predicted
    return {
        "stop": list(step.wave.stop),
        "start": list(step.wave.start),
        "retire": list(step.wave.retire),
        "sources": list(step.senders),
        "moved_bytes": traffic.moved_bytes,
        "local_bytes": traffic.local_bytes,
        "links_busy_s": step.transfer.busy_s,
        "largest_bytes": max(step.transfer.given_bytes.values(), default=0),
        "links": [
            {"source": source, "target": target, "bytes": size}
            for (source, target), size in sorted(traffic.pairs.items())
        ],
        "converted": len({(c.replica, c.parameter) for c in step.transfer.conversions}),
        "phases_s": {
            "room": round(predicted.room_s, 3),
            "prepare": round(predicted.prepare_s, 3),
            "transfer": round(predicted.transfer_s, 3),
            "verify": round(predicted.verify_s, 3),
            "commit": round(predicted.commit_s, 3),
            "drain": round(predicted.drain_s, 3),
        },
    }
