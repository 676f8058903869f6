"""Validation of deployment plans: are they possible, and do they serve every workload type?"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    LengthClass,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
    parts_of,
)


def check_plan(plan: DeploymentPlan, devices: Sequence[Device], *, place: str = "plan") -> None:
    """Raise OServeError for the first defect of the plan."""
    if not plan.replicas:
        raise OServeError("there are no replicas", place=place, remedy="list at least one replica")
    _check_unique([spec.id for spec in plan.replicas], "replica id", f"{place}.replicas")
    known = {device.id: device for device in devices}
    used: dict[str, str] = {}
    for index, spec in enumerate(plan.replicas):
        here = f"{place}.replicas[{index}]"
        _check_replica(spec, here)
        for device in spec.devices:
            _check_device(device, spec, known, used, here)
            used[device] = spec.id
        if spec.devices:
            parts_of(spec, known, place=f"{here}.devices")
    _check_types(plan, place)
    _check_shares(plan, place)


def _check_replica(spec: ReplicaSpec, place: str) -> None:
    shape = spec.shape
    if isinstance(spec.backend, AttachedBackend):
        if spec.devices:
            raise OServeError(
                f"replica {spec.id!r} is attached by URL, so it has no devices here",
                place=f"{place}.devices",
                remedy="leave devices out",
            )
        return
    if len(spec.devices) != shape.device_count:
        raise OServeError(
            f"replica {spec.id!r} has tensor_parallel_size {shape.tensor_parallel_size} x "
            f"pipeline_parallel_size {shape.pipeline_parallel_size} = {shape.device_count} "
            f"devices, but {len(spec.devices)} are listed",
            place=f"{place}.devices",
            remedy=f"list {shape.device_count} devices, or change the sizes",
        )


def _check_device(
    device: str, spec: ReplicaSpec, known: dict[str, Device], used: dict[str, str], place: str
) -> None:
    if device not in known:
        raise OServeError(
            f"replica {spec.id!r} names device {device!r}, but there are {len(known)}: "
            f"{', '.join(known) or 'none'}",
            place=f"{place}.devices",
            remedy="use the devices there are, or set cluster.cpu_slots for more CPU slots",
        )
    if device in used:
        raise OServeError(
            f"device {device!r} is given to replica {used[device]!r} and to {spec.id!r}",
            place=f"{place}.devices",
            remedy="give each device to one replica",
        )


def _check_types(plan: DeploymentPlan, place: str) -> None:
    here = f"{place}.workload_types"
    if not plan.length_classes:
        raise OServeError(
            "there are no workload types", place=here, remedy="list at least one type"
        )
    _check_unique([kind.name for kind in plan.length_classes], "type name", here)
    bounds = [kind.max_prompt_tokens for kind in plan.length_classes]
    if bounds[-1] is not None:
        raise OServeError(
            f"prompts over {bounds[-1]} tokens have no type",
            place=f"{here}[{len(bounds) - 1}].max_prompt_tokens",
            remedy="leave max_prompt_tokens out of the last type",
        )
    previous = 0
    for index, bound in enumerate(bounds[:-1]):
        if bound is None or bound <= previous:
            raise OServeError(
                "the types' max_prompt_tokens must be set and ascend",
                place=f"{here}[{index}].max_prompt_tokens",
                remedy="order the types from short prompts to long ones",
            )
        previous = bound


def _check_shares(plan: DeploymentPlan, place: str) -> None:
    replicas = {spec.id for spec in plan.replicas}
    names = {kind.name for kind in plan.length_classes}
    for name, shares in plan.routing_shares.items():
        here = f"{place}.routing_shares.{name}"
        if name not in names:
            raise OServeError(
                f"there is no workload type {name!r}",
                place=here,
                remedy=f"use one of {', '.join(sorted(names))}",
            )
        _check_row(shares, replicas, here)
    missing = names - set(plan.routing_shares)
    if missing:
        raise OServeError(
            f"workload type {min(missing)!r} has no routing shares",
            place=f"{place}.routing_shares",
            remedy="give each type shares over the replicas that should serve it",
        )
    if plan.planned_types:
        _check_unique([kind.name for kind in plan.planned_types], "type name", f"{place}.types")
    for index, kind in enumerate(plan.planned_types):
        _check_row(kind.shares, replicas, f"{place}.types[{index}].shares")


def _check_row(shares: Mapping[str, float], replicas: Set[str], here: str) -> None:
    """Check the shares of one type."""
    unknown = [replica for replica in shares if replica not in replicas]
    if unknown:
        raise OServeError(
            f"there is no replica {unknown[0]!r}",
            place=f"{here}.{unknown[0]}",
            remedy=f"use one of {', '.join(sorted(replicas))}",
        )
    values = list(shares.values())
    if any(not math.isfinite(value) or value < 0 for value in values):
        raise OServeError(
            "shares must be numbers of at least 0", place=here, remedy="correct the share"
        )
    if abs(sum(values) - 1.0) > 1e-6:
        raise OServeError(
            f"the shares sum to {sum(values):g}",
            place=here,
            remedy="make them sum to 1",
        )


def _check_unique(names: list[str], what: str, place: str) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise OServeError(
            f"the {what} {name!r} stands {count} times", place=place, remedy="make it unique"
        )


def default_plan(devices: Sequence[Device], shapes: Sequence[ReplicaShape]) -> DeploymentPlan:
    """A plan without knowledge of the traffic: one replica per shape in turn, devices in order.

    The shapes repeat until the devices are used up. Short prompts go to all but the last replica
    and long ones to the last, so that documents do not delay chats.
    """
    replicas: list[ReplicaSpec] = []
    free = list(devices)
    index = 0
    while free:
        shape = shapes[index % len(shapes)]
        if shape.device_count > len(free):
            break
        taken, free = free[: shape.device_count], free[shape.device_count :]
        replicas.append(
            ReplicaSpec(id=f"r{index}", shape=shape, devices=tuple(item.id for item in taken))
        )
        index += 1
    if not replicas:
        raise OServeError(
            f"{len(devices)} devices hold none of the default shapes",
            place="cluster",
            remedy="give a plan with --plan",
        )
    names = [spec.id for spec in replicas]
    short = names[:-1] or names
    return DeploymentPlan(
        id="default",
        replicas=tuple(replicas),
        length_classes=(
            LengthClass(name="short", max_prompt_tokens=512),
            LengthClass(name="long"),
        ),
        routing_shares={
            "short": {name: 1.0 / len(short) for name in short},
            "long": {names[-1]: 1.0},
        },
    )
