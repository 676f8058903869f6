"""What an examination means: facts in, findings out. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from oserve.nodes.examination import ClockFacts, LinkFacts, MachineFacts, NodeExamination

CLUSTER: Final = "cluster"
"""The subject of findings that compare nodes."""

_GIB = 1 << 30
_MIB = 1 << 20
_SMALL_SHARED_BYTES = 256 * _MIB
_SHARED_BYTES = _GIB
_OPEN_FILES = 65536
_FEW_OPEN_FILES = 4096
_CLOCK_S = 0.5
_DELAY_S = 0.005
_BYTES_PER_S = 1e8
_SHOWN = 4


class NodeVerdict(StrEnum):
    """``warn``: it works, but worse than it could, or might not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFinding:
    """One finding about a node, or about the cluster. ``remedy``: the setting or command that
    changes it; empty only if it is ``ok``."""

    node: str
    check: str
    verdict: NodeVerdict
    found: str
    remedy: str = ""


def judge(nodes: Sequence[NodeExamination]) -> list[NodeFinding]:
    """The findings of an examination: node by node, then what compares nodes."""
    findings = [finding for node in nodes for finding in _of_node(node)]
    machines = {node.node: node.machine for node in nodes if node.machine is not None}
    if len(nodes) > 1:
        findings.extend(_versions_alike(machines))
        findings.extend(_mtus_alike(machines))
    findings.extend(_model_alike(machines))
    return findings


def worst(findings: Sequence[NodeFinding]) -> NodeVerdict:
    """The worst verdict; ``ok`` without any."""
    order = list(NodeVerdict)
    return max((finding.verdict for finding in findings), key=order.index, default=NodeVerdict.OK)


def exit_code(findings: Sequence[NodeFinding], *, strict: bool) -> int:
    """0: all is well; 2: something failed; 1: there are warnings, which count if ``strict``."""
    match worst(findings):
        case NodeVerdict.FAIL:
            return 2
        case NodeVerdict.WARN if strict:
            return 1
    return 0


# -- one node -------------------------------------------------------------------------------------
def _of_node(node: NodeExamination) -> Iterator[NodeFinding]:
    if node.unreached:
        yield NodeFinding(
            node=node.node,
            check="reach",
            verdict=NodeVerdict.FAIL,
            found=node.unreached,
            remedy=node.remedy or "is the node up, and its hatch's port open to this machine?",
        )
    if node.machine is not None:
        for check in _MACHINE_CHECKS:
            for name, verdict, found, remedy in check(node.machine):
                yield NodeFinding(
                    node=node.node, check=name, verdict=verdict, found=found, remedy=remedy
                )
    if node.devices:
        found = f"{node.devices} offered, {node.engines} engines run"
        yield NodeFinding(node=node.node, check="devices", verdict=NodeVerdict.OK, found=found)
    if node.clock is not None:
        yield _clock(node.node, node.clock)
    for link in node.links:
        yield _link(node.node, link)


_Judged = tuple[str, NodeVerdict, str, str]


def _versions(machine: MachineFacts) -> Iterator[_Judged]:
    yield "python", NodeVerdict.OK, machine.python or "unknown", ""
    yield "oserve", NodeVerdict.OK, machine.oserve, ""
    if machine.engine:
        yield "vllm", NodeVerdict.OK, machine.engine, ""
    else:
        yield (
            "vllm",
            NodeVerdict.WARN,
            "not installed: only attached servers can be used",
            "pip install 'oserve[gpu]' or 'oserve[cpu]'",
        )
    if machine.driver:
        yield "driver", NodeVerdict.OK, machine.driver, ""


def _sizes(machine: MachineFacts) -> Iterator[_Judged]:
    cores = f"{machine.cores} usable cores"
    few = machine.cores < 2
    yield (
        "cores",
        NodeVerdict.WARN if few else NodeVerdict.OK,
        cores,
        "give the container or machine two cores or more" if few else "",
    )
    free = f"{machine.free_bytes / _GIB:.1f} of {machine.memory_bytes / _GIB:.1f} GiB free"
    low = machine.free_bytes < machine.memory_bytes / 10
    yield (
        "memory",
        NodeVerdict.WARN if low else NodeVerdict.OK,
        free,
        "end other programs, or raise the container's memory limit" if low else "",
    )
    yield _shared_memory(machine.shared_memory_bytes)
    yield _open_files(machine.open_files)


def _shared_memory(size_bytes: int) -> _Judged:
    found = f"{size_bytes / _MIB:,.0f} MiB"
    remedy = "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if size_bytes < _SMALL_SHARED_BYTES:
        return "/dev/shm", NodeVerdict.FAIL, f"{found}, too little for ranks of one engine", remedy
    if size_bytes < _SHARED_BYTES:
        return "/dev/shm", NodeVerdict.WARN, f"{found}, little for several engines", remedy
    return "/dev/shm", NodeVerdict.OK, found, ""


def _open_files(limit: int) -> _Judged:
    remedy = f"ulimit -n {_OPEN_FILES}; with systemd LimitNOFILE={_OPEN_FILES}"
    if limit < _FEW_OPEN_FILES:
        return "open files", NodeVerdict.WARN, f"{limit:,}, few for streams of clients", remedy
    return "open files", NodeVerdict.OK, f"{limit:,}", ""


def _gpus(machine: MachineFacts) -> Iterator[_Judged]:
    if not machine.gpus:
        yield "gpus", NodeVerdict.OK, "none: CPU slots are the devices", ""
    for gpu in machine.gpus:
        free = (gpu.memory_bytes - gpu.used_bytes) / _GIB
        found = f"{gpu.kind}, {free:.1f} of {gpu.memory_bytes / _GIB:.1f} GiB free"
        if gpu.mig:
            yield (
                gpu.name,
                NodeVerdict.FAIL,
                f"{found}; MIG is on, and OServe uses whole GPUs",
                "turn it off: nvidia-smi -mig 0 on that GPU, or leave it out of "
                "CUDA_VISIBLE_DEVICES",
            )
        elif gpu.strangers:
            names = ", ".join(gpu.strangers[:_SHOWN])
            yield (
                gpu.name,
                NodeVerdict.FAIL,
                f"{found}; in use by {names}",
                "end that program, or leave the GPU out of CUDA_VISIBLE_DEVICES",
            )
        else:
            yield gpu.name, NodeVerdict.OK, found, ""


def _interfaces(machine: MachineFacts) -> Iterator[_Judged]:
    for item in machine.interfaces:
        speed = f", {item.speed_mbps:,} Mbit/s" if item.speed_mbps > 0 else ""
        yield f"interface {item.name}", NodeVerdict.OK, f"MTU {item.mtu}{speed}", ""


_MACHINE_CHECKS: tuple[Callable[[MachineFacts], Iterator[_Judged]], ...] = (
    _versions,
    _sizes,
    _gpus,
    _interfaces,
)


def _clock(node: str, clock: ClockFacts) -> NodeFinding:
    ahead_s, within_s = clock.ahead_s, clock.within_s
    # Only what the round trip cannot explain is the clock's.
    off = abs(ahead_s) - within_s > _CLOCK_S
    side = "ahead of" if ahead_s >= 0 else "behind"
    return NodeFinding(
        node=node,
        check="clock",
        verdict=NodeVerdict.WARN if off else NodeVerdict.OK,
        found=f"{abs(ahead_s) * 1e3:.1f} ms {side} this machine's (within {within_s * 1e3:.1f} ms)",
        remedy="run chronyd or systemd-timesyncd: times in logs do not compare" if off else "",
    )


def _link(node: str, link: LinkFacts) -> NodeFinding:
    check = f"link to {link.target}"
    if link.error:
        remedy = f"open the hatch's port of {link.target} to {node}"
        return NodeFinding(
            node=node, check=check, verdict=NodeVerdict.FAIL, found=link.error, remedy=remedy
        )
    found = f"{link.round_trip_s * 1e3:.2f} ms there and back"
    if link.bytes_per_s:
        found += f", {link.bytes_per_s / 1e6:,.0f} MB/s echoed"
    slow = 0 < link.bytes_per_s < _BYTES_PER_S
    late = link.round_trip_s > _DELAY_S
    remedy = ""
    if slow:
        remedy = "use a faster network or interface for the hatches; raise its MTU"
    elif late:
        remedy = "keep a replica on one node: pipeline stages wait for the network at each step"
    verdict = NodeVerdict.WARN if slow or late else NodeVerdict.OK
    return NodeFinding(node=node, check=check, verdict=verdict, found=found, remedy=remedy)


# -- nodes beside each other ----------------------------------------------------------------------
def _versions_alike(machines: dict[str, MachineFacts]) -> Iterator[NodeFinding]:
    same = "install the same version of {} on every node"
    checks: tuple[tuple[str, str, NodeVerdict, Callable[[MachineFacts], str]], ...] = (
        ("oserve", same.format("OServe"), NodeVerdict.FAIL, lambda item: item.oserve),
        ("vllm", same.format("vLLM"), NodeVerdict.FAIL, lambda item: item.engine),
        ("python", same.format("Python"), NodeVerdict.WARN, lambda item: item.python),
        ("driver", same.format("the NVIDIA driver"), NodeVerdict.WARN, lambda item: item.driver),
    )
    for check, remedy, verdict, value in checks:
        found = {node: value(machine) for node, machine in machines.items()}
        yield _alike(check, found, verdict, remedy)


def _mtus_alike(machines: dict[str, MachineFacts]) -> Iterator[NodeFinding]:
    found = {
        node: "/".join(sorted({str(item.mtu) for item in machine.interfaces}))
        for node, machine in machines.items()
        if machine.interfaces
    }
    yield _alike(
        "mtu", found, NodeVerdict.WARN, "ip link set dev INTERFACE mtu MTU, the same on each"
    )


def _model_alike(machines: dict[str, MachineFacts]) -> Iterator[NodeFinding]:
    examined = {
        node: machine.model for node, machine in machines.items() if machine.model is not None
    }
    if not examined:
        return
    present = {node: model for node, model in examined.items() if model.files}
    for node, model in examined.items():
        if not model.files:
            yield NodeFinding(
                node=node,
                check="model",
                verdict=NodeVerdict.WARN,
                found=model.error or "its files are not here",
                remedy="oserve serve sends them there from a node that has them "
                "(cluster.fetch); else copy them there, or let engines download them",
            )
            continue
        size = sum(file.size_bytes for file in model.files) / _GIB
        found = f"{len(model.files)} files, {size:.2f} GiB"
        if any(file.sampled for file in model.files):
            found += "; large ones by size and samples"
        yield NodeFinding(node=node, check="model", verdict=NodeVerdict.OK, found=found)
    if len(present) > 1:
        yield _same_files(
            {
                node: {file.name: file.digest for file in model.files}
                for node, model in present.items()
            }
        )


def _same_files(nodes: dict[str, dict[str, str]]) -> NodeFinding:
    names = sorted({name for files in nodes.values() for name in files})
    differ = [name for name in names if len({files.get(name) for files in nodes.values()}) > 1]
    if not differ:
        return NodeFinding(
            node=CLUSTER,
            check="model",
            verdict=NodeVerdict.OK,
            found=f"the same {len(names)} files on {len(nodes)} nodes",
        )
    first = differ[0]
    found, _ = _grouped({node: files.get(first, "") for node, files in nodes.items()}, "missing")
    more = f", and {len(differ) - 1} more files" if len(differ) > 1 else ""
    return NodeFinding(
        node=CLUSTER,
        check="model",
        verdict=NodeVerdict.FAIL,
        found=f"{first} differs{more}: {found}",
        remedy="download the same revision on every node, or copy the folder with rsync -c",
    )


def _alike(check: str, values: dict[str, str], verdict: NodeVerdict, remedy: str) -> NodeFinding:
    words, same = _grouped(values, "none")
    if same:
        return NodeFinding(
            node=CLUSTER, check=check, verdict=NodeVerdict.OK, found=f"all alike: {words}"
        )
    return NodeFinding(node=CLUSTER, check=check, verdict=verdict, found=words, remedy=remedy)


def _grouped(values: dict[str, str], missing: str) -> tuple[str, bool]:
    """Values with the nodes that have them, the most frequent first; whether all are the same."""
    counts = Counter(values.values())
    if len(counts) <= 1:
        return next(iter(counts), "") or missing, True
    parts = []
    for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        nodes = sorted(node for node, other in values.items() if other == value)
        shown = ", ".join(nodes[:_SHOWN]) + (f" and {count - _SHOWN} more" * (count > _SHOWN))
        parts.append(f"{value or missing} on {shown}")
    return "; ".join(parts), False


# -- which links are measured ---------------------------------------------------------------------
def measuring_rounds(nodes: Sequence[str], most_pairs: int) -> list[list[tuple[str, str]]]:
    """Pairs of nodes to measure at a time: in a round, no node is in two pairs.

    All pairs, if they are at most ``most_pairs``; else whole rounds up to that number, in each of
    which nearly every node has a partner. (The circle method of tournaments.)
    """
    ring: list[str] = [*nodes, *([""] if len(nodes) % 2 else [])]
    rounds: list[list[tuple[str, str]]] = []
    total = 0
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = [
            (one, other)
            for one, other in zip(ring[:half], reversed(ring[half:]), strict=True)
            if one and other
        ]
        if rounds and total + len(pairs) > most_pairs:
            break
        total += len(pairs)
        rounds.append(pairs[:most_pairs])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds
