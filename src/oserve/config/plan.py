"""Plan files: deployment plans as YAML."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from oserve.config.attach import AttachFile, attach_row, attached_backend
from oserve.config.reading import convert, parse_yaml, read_document
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    LengthClass,
    OServeError,
    PlannedType,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)

Count = Annotated[int, msgspec.Meta(ge=1)]


class _ReplicaFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")]
    shape: dict[str, Any] = {}
    devices: list[str] = []
    engine_args: list[str] = []
    attach: AttachFile | None = None


class _TypeFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{1,63}\Z")]
    max_prompt_tokens: Count | None = None
    output_tokens: Count = 128


class _CentreFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{1,63}\Z")]
    prompt_tokens: Annotated[float, msgspec.Meta(ge=0)]
    output_tokens: Annotated[float, msgspec.Meta(ge=0)]
    shares: dict[str, float]
    tier: str = ""


class _ShapeFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    precision: str = "bf16"
    max_num_batched_tokens: Count = 2048
    max_num_seqs: Count = 128
    kv_cache_memory_bytes: Count | None = None
    device_kind: str = "any"


class _PlanFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    replicas: list[_ReplicaFile]
    id: str = "plan"
    workload_types: list[_TypeFile] = []
    routing_shares: dict[str, dict[str, float]] | None = None
    types: list[_CentreFile] = []


def load_plan(file: str) -> DeploymentPlan:
    """The plan in a file. ``plan.check_plan`` checks it against devices."""
    return _plan(read_document(Path(file)), file)


def parse_plan(text: str, *, place: str) -> DeploymentPlan:
    """The plan in the text of a plan file; errors name ``place``."""
    return _plan(parse_yaml(text, place=place), place)


def _plan(document: dict[str, Any], file: str) -> DeploymentPlan:
    parsed = convert(document, _PlanFile, place=file)
    kinds = tuple(
        LengthClass(
            name=kind.name,
            max_prompt_tokens=kind.max_prompt_tokens,
            output_tokens=kind.output_tokens,
        )
        for kind in parsed.workload_types
    ) or (LengthClass(name="all"),)
    replicas = tuple(
        _replica(item, place=f"{file}: replicas[{index}]")
        for index, item in enumerate(parsed.replicas)
    )
    equal = {item.id: 1.0 / len(replicas) for item in replicas}
    shares = parsed.routing_shares
    return DeploymentPlan(
        id=parsed.id,
        replicas=replicas,
        length_classes=kinds,
        routing_shares={kind.name: dict(equal) for kind in kinds} if shares is None else shares,
        planned_types=tuple(
            PlannedType(
                name=kind.name,
                prompt_tokens=kind.prompt_tokens,
                output_tokens=kind.output_tokens,
                shares=kind.shares,
                tier=kind.tier,
            )
            for kind in parsed.types
        ),
    )


def _replica(item: _ReplicaFile, *, place: str) -> ReplicaSpec:
    convert(item.shape, _ShapeFile, place=f"{place}.shape")
    shape = convert(item.shape, ReplicaShape, place=f"{place}.shape")
    backend: VllmBackend | AttachedBackend = VllmBackend(engine_args=tuple(item.engine_args))
    if item.attach is not None:
        backend = attached_backend(item.attach, place=f"{place}.attach")
        if item.engine_args:
            raise OServeError(
                "an attached server is not started here, so it takes no engine_args",
                place=f"{place}.engine_args",
                remedy="leave engine_args out",
            )
    return ReplicaSpec(id=item.id, shape=shape, devices=tuple(item.devices), backend=backend)


def plan_yaml(plan: DeploymentPlan, *, head: str = "") -> str:
    """The text of a plan file that ``load_plan`` reads, with the lines of ``head`` as comments."""
    document: dict[str, Any] = {
        "id": plan.id,
        "workload_types": [_without_defaults(_type_row(kind)) for kind in plan.length_classes],
        "replicas": [_replica_row(spec) for spec in plan.replicas],
        "routing_shares": {
            kind: {name: _share(value) for name, value in shares.items() if value > 0}
            for kind, shares in plan.routing_shares.items()
        },
    }
    if plan.planned_types:
        document["types"] = [
            {
                "name": kind.name,
                **({"tier": kind.tier} if kind.tier else {}),
                "prompt_tokens": kind.prompt_tokens,
                "output_tokens": kind.output_tokens,
                "shares": {n: _share(value) for n, value in kind.shares.items() if value > 0},
            }
            for kind in plan.planned_types
        ]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    return comments + yaml.safe_dump(document, sort_keys=False, width=100)


def _share(value: float) -> float:
    # Enough digits that the shares of a type sum to 1 within the tolerance of ``check_plan``.
    return float(f"{value:.9f}")


def _type_row(kind: LengthClass) -> dict[str, Any]:
    return {
        "name": kind.name,
        "max_prompt_tokens": kind.max_prompt_tokens,
        "output_tokens": kind.output_tokens,
    }


def _replica_row(spec: ReplicaSpec) -> dict[str, Any]:
    shape = spec.shape
    row: dict[str, Any] = {
        "id": spec.id,
        "shape": _without_defaults(
            {
                "tensor_parallel_size": shape.tensor_parallel_size,
                "pipeline_parallel_size": shape.pipeline_parallel_size,
                "precision": shape.precision.value,
                "max_num_batched_tokens": shape.max_num_batched_tokens,
                "max_num_seqs": shape.max_num_seqs,
                "kv_cache_memory_bytes": shape.kv_cache_memory_bytes,
                "device_kind": None if shape.device_kind == "any" else shape.device_kind,
            }
        ),
        "devices": list(spec.devices),
    }
    backend = spec.backend
    if isinstance(backend, VllmBackend):
        if backend.engine_args:
            row["engine_args"] = list(backend.engine_args)
        return row
    row["attach"] = attach_row(backend)
    del row["shape"]
    return row


def _without_defaults(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}
