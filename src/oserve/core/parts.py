"""The parts of a replica whose pipeline stages lie on several nodes.

vLLM deals ranks node by node, equally many to each, tensor-parallel ranks fastest. So such a
replica consists of *parts*: consecutive stages on one node, run by one engine process. The first
part leads: it has the API server; the others have workers only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from oserve.core.errors import OServeError
from oserve.core.plan import ReplicaSpec
from oserve.core.shape import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPart:
    """The stages of a replica on one node.

    ``index`` of ``count`` parts; part 0 leads. ``ranks`` of the replica; ``devices`` in their
    order.
    """

    index: int
    count: int
    node: str
    ranks: range
    devices: tuple[Device, ...]

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        return f"part {self.index + 1} of {self.count} (node {self.node}, {ranks})"


def parts_of(
    spec: ReplicaSpec, devices: Mapping[str, Device], *, place: str = ""
) -> tuple[ReplicaPart, ...]:
    """The parts of a replica on these devices (by id), the leader first; one if it is on one node.

    Raises OServeError, at ``place``, if vLLM cannot run it so: another number of devices, a stage
    over two nodes, the stages of a node not consecutive, or not equally many on each node.
    """
    own = tuple(devices[name] for name in spec.devices)
    width, place = spec.shape.tensor_parallel_size, place or f"replica {spec.id}"
    if len(own) != spec.shape.device_count:
        raise OServeError(
            f"{spec.shape.name} needs {spec.shape.device_count} devices, but {len(own)} are listed",
            place=place,
            remedy="list one device for each rank",
        )
    stages = [own[start : start + width] for start in range(0, len(own), width)]
    for stage in stages:
        nodes = sorted({device.node for device in stage})
        if len(nodes) > 1:
            raise OServeError(
                f"replica {spec.id!r} spreads one tensor-parallel group over nodes "
                f"{', '.join(nodes)}",
                place=place,
                remedy="keep each group of tensor_parallel_size devices on one node",
            )
    runs = [(node, len(list(run))) for node, run in groupby(stages, lambda one: one[0].node)]
    _check_runs(runs, place)
    share = len(own) // len(runs)
    return tuple(
        ReplicaPart(
            index=index,
            count=len(runs),
            node=node,
            ranks=range(index * share, (index + 1) * share),
            devices=own[index * share : (index + 1) * share],
        )
        for index, (node, _) in enumerate(runs)
    )


def _check_runs(runs: Sequence[tuple[str, int]], place: str) -> None:
    """Check consecutive stages by node."""
    told = ", ".join(f"{number} on {node}" for node, number in runs)
    if len({node for node, _ in runs}) < len(runs):
        raise OServeError(
            f"the pipeline stages of a node are not consecutive: {told}",
            place=place,
            remedy="list the devices of one node after those of the other",
        )
    if len({number for _, number in runs}) > 1:
        raise OServeError(
            f"vLLM runs equally many stages on each node, but there are {told}",
            place=place,
            remedy="give each node the same number of stages, or use one node",
        )


def node_of_rank(parts: Sequence[ReplicaPart], rank: int) -> str:
    """The node of a rank: a path that the rank tells is a path there."""
    return next(part.node for part in parts if rank in part.ranks)
