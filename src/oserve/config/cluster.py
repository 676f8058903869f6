"""Clusters as text: ``4x8xH100``, parts joined by ``+``, or a YAML file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from oserve.config.reading import convert, read_document
from oserve.core import Device, OServeError
from oserve.perf.device import find_device, find_link
from oserve.perf.source import DEFAULT_NETWORK

_DeviceCount = Annotated[int, msgspec.Meta(ge=1, le=65536)]
_PART = re.compile(r"^(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([A-Za-z][\w.\- ]*)$")
MAX_DEVICES = 65536
_SHAPE = "for example 8xH100, 4x8xH100 (nodes x devices x kind), 2x8xH100+4x4xL40S, or a YAML file"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Devices in nodes, and the link between nodes: a name in the link catalogue of ``perf``."""

    devices: tuple[Device, ...]
    network: str = DEFAULT_NETWORK


class _NodesFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    kind: str
    devices: _DeviceCount
    count: _DeviceCount = 1
    memory_gib: Annotated[float, msgspec.Meta(gt=0)] | None = None


class _ClusterFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    nodes: list[_NodesFile]
    network: str = DEFAULT_NETWORK


def load_cluster(text: str) -> ClusterSpec:
    """A cluster from its short form or a YAML file; raises OServeError naming the invalid part.

    Device ids of a single node are ``gpu:0``, ``gpu:1``, ..., as ``oserve serve`` names those of
    its machine; with several nodes the node comes first, as in ``n0/gpu:0``.
    """
    if text.endswith((".yaml", ".yml", ".json")) or Path(text).is_file():
        parsed = convert(read_document(Path(text)), _ClusterFile, place=text)
        find_link(parsed.network)
        return ClusterSpec(devices=_devices(parsed.nodes, text), network=parsed.network)
    nodes = []
    for part in text.split("+"):
        matched = _PART.match(part.strip())
        if matched is None:
            raise OServeError(
                f"{part.strip()!r} is not a set of devices", place="--cluster", remedy=_SHAPE
            )
        count, devices, kind = int(matched[1] or 1), int(matched[2]), matched[3]
        if count * devices == 0:
            raise OServeError(
                f"{part.strip()!r} is an empty cluster", place="--cluster", remedy=_SHAPE
            )
        nodes.append(_NodesFile(kind=kind, devices=devices, count=count))
    return ClusterSpec(devices=_devices(nodes, "--cluster"))


def _devices(nodes: list[_NodesFile], place: str) -> tuple[Device, ...]:
    total = sum(item.count * item.devices for item in nodes)
    if total == 0:
        raise OServeError("it is an empty cluster", place=place, remedy=_SHAPE)
    if total > MAX_DEVICES:
        raise OServeError(
            f"{total:,} devices are too many", place=place, remedy=f"at most {MAX_DEVICES:,}"
        )
    alone = sum(item.count for item in nodes) == 1
    found = []
    number = 0
    for item in nodes:
        facts = find_device(item.kind)
        memory = facts.memory_bytes if item.memory_gib is None else int(item.memory_gib * 2**30)
        prefix = "cpu" if facts.kind == "cpu" else "gpu"
        for _ in range(item.count):
            node = "local" if alone else f"n{number}"
            number += 1
            for index in range(item.devices):
                own = f"{prefix}:{index}"
                found.append(
                    Device(
                        id=own if alone else f"{node}/{own}",
                        kind=facts.kind,
                        node=node,
                        memory_bytes=memory,
                    )
                )
    return tuple(found)
