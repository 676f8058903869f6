"""Clusters as text: ``4x8xH100``, parts joined by ``+``, or a YAML file.

A file describes ``nodes`` to plan for, or lists ``hosts`` to serve on.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from oserve.config.reading import convert, read_document
from oserve.core import Device, OServeError
from oserve.nodes.hatch_messages import NODE_NAMES
from oserve.nodes.host_cluster import HostEntry
from oserve.perf.device import find_device, find_link
from oserve.perf.source import DEFAULT_NETWORK

_DeviceCount = Annotated[int, msgspec.Meta(ge=1, le=65536)]
_PART = re.compile(r"^(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([A-Za-z][\w.\- ]*)$")
MAX_DEVICES = 65536
MAX_HOSTS = 1024
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
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


class _HostFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=rf"^{NODE_NAMES}\Z")]
    address: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9:][A-Za-z0-9._:-]*\Z")]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    token_file: Annotated[str, msgspec.Meta(min_length=1)]
    certificate_sha256: str


class _ClusterFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    nodes: list[_NodesFile] = []
    hosts: list[_HostFile] = []
    network: str = ""


def load_cluster(text: str) -> ClusterSpec:
    """A cluster from its short form or a YAML file; raises OServeError naming the invalid part.

    Device ids of a single node are ``gpu:0``, ``gpu:1``, ..., as ``oserve serve`` names those of
    its machine; with several nodes the node comes first, as in ``n0/gpu:0``.
    """
    if _is_file(text):
        parsed = convert(read_document(Path(text)), _ClusterFile, place=text)
        network = parsed.network or DEFAULT_NETWORK
        find_link(network)
        if parsed.hosts:
            raise OServeError(
                "it lists hosts, whose devices are known only once they run",
                place=f"{text}: hosts",
                remedy="use it with oserve serve --cluster, or describe the devices under nodes",
            )
        return ClusterSpec(devices=_devices(parsed.nodes, text), network=network)
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


def lists_hosts(text: str) -> bool:
    """Whether it is a cluster file with hosts; raises OServeError for one that cannot be read."""
    if not _is_file(text):
        return False
    return bool(convert(read_document(Path(text)), _ClusterFile, place=text).hosts)


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json")) or Path(text).is_file()


def load_hosts(file: str) -> tuple[HostEntry, ...]:
    """The hosts that a cluster file lists; raises OServeError naming the invalid part."""
    parsed = convert(read_document(Path(file)), _ClusterFile, place=file)
    find_link(parsed.network or DEFAULT_NETWORK)
    if parsed.nodes or not parsed.hosts:
        raise OServeError(
            "to serve on several machines a cluster file lists hosts, and no nodes",
            place=file,
            remedy="list the lines that oserve node serve prints under hosts",
        )
    if len(parsed.hosts) > MAX_HOSTS:
        raise OServeError(
            f"{len(parsed.hosts):,} hosts are too many",
            place=f"{file}: hosts",
            remedy=f"at most {MAX_HOSTS:,}",
        )
    seen: dict[str, str] = {}
    for index, host in enumerate(parsed.hosts):
        place = f"{file}: hosts[{index}]"
        for value in (host.name, f"{host.address} port {host.port}"):
            if value in seen:
                raise OServeError(
                    f"{value} is there already", place=place, remedy=f"see {seen[value]}"
                )
            seen[value] = place
    return tuple(
        HostEntry(
            name=host.name,
            address=host.address,
            port=host.port,
            token_file=host.token_file,
            certificate_sha256=_fingerprint(host.certificate_sha256, f"{file}: hosts[{index}]"),
        )
        for index, host in enumerate(parsed.hosts)
    )


def named_network(file: str) -> str:
    """The link between nodes that a cluster file names; empty if it names none."""
    return convert(read_document(Path(file)), _ClusterFile, place=file).network


def _fingerprint(text: str, place: str) -> str:
    """64 hexadecimal digits; colons between them are allowed, as openssl prints them."""
    digits = text.replace(":", "").lower()
    if not _FINGERPRINT.fullmatch(digits):
        raise OServeError(
            "a SHA-256 has 64 hexadecimal digits",
            place=f"{place}.certificate_sha256",
            remedy="copy the one that oserve node serve prints on that host, in quotes",
        )
    return digits


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
