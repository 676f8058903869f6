"""The report of a plan: tables, reasons, JSON, and plain vLLM command lines."""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from oserve.core import Device, Precision, ReplicaShape, ReplicaSpec
from oserve.plan.planning import PlanResult, PredictedRates, used_shapes
from oserve.plan.search import DeploymentCandidate

_QUANTISED = {Precision.FP8: ("--quantization", "fp8")}
_DTYPES = {
    Precision.FP32: ("--dtype", "float32"),
    Precision.BF16: ("--dtype", "bfloat16"),
    Precision.FP16: ("--dtype", "float16"),
}
_FIRST_PORT = 8001
_SHOWN = 5


def headline(found: PlanResult, verdicts: Sequence[str] = ()) -> str:
    """A summary of the plan in a few lines of plain text; ``verdicts``: what it is good for."""
    request = found.request
    devices = request.devices
    kinds = {device.kind: 0 for device in devices}
    for device in devices:
        kinds[device.kind] += 1
    cluster = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines = [
        f"Plan for {request.model} on {cluster}, by {request.source.origin}",
        f"demand {found.predicted.demand_rps:.2f} requests/s of {len(found.problem.types)} types "
        f"from {request.demand.source}",
        *(verdicts or [verdict(found)]),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def show(
    found: PlanResult, console: Console, *, explain: bool, verdicts: Sequence[str] = ()
) -> None:
    """Print the plan for people; see ``headline``."""
    for line in headline(found, verdicts).splitlines():
        console.print(line, markup=False)
    console.print(_replicas(found))
    if explain or not verdicts:
        console.print(_comparison(found))
    if explain:
        _explain(found, console)


def show_commands(found: PlanResult, console: Console) -> None:
    """Print how to run the same replicas with vLLM alone."""
    console.print("The same replicas without OServe (each on its own port):")
    for line in vllm_commands(found):
        console.print("  " + line, markup=False)


def document(found: PlanResult) -> dict[str, Any]:
    """The plan as JSON-ready data."""
    problem, planned = found.problem, found.planned
    return {
        "model": found.request.model,
        "performance": found.request.source.origin,
        "replicas": [
            {
                "id": spec.id,
                "shape": _shape(spec.shape),
                "devices": list(spec.devices),
                "utilisation": found.placed.utilisation[spec.id],
            }
            for spec in found.plan.replicas
        ],
        "routing_shares": {
            kind: dict(shares) for kind, shares in found.placed.routing_shares.items()
        },
        "types": [
            {
                "name": kind.name,
                "prompt_tokens": kind.prompt_tokens,
                "output_tokens": kind.output_tokens,
                "arrival_rate_rps": kind.arrival_rate_rps,
                "price": planned.best.assignment.price[index],
            }
            for index, kind in enumerate(problem.types)
        ],
        "predicted": _predicted(found.predicted),
        "scale": planned.best.score.scale,
        "baseline": _other(found, found.baseline)
        | {"predicted": _predicted(found.baseline_predicted)},
        "gain": found.gain,
        "usual": None if found.usual is None else _other(found, found.usual),
        "candidates": [_other(found, item) for item in planned.candidates],
        "search": planned.search.value,
        "bound": {"scale" if planned.bounds_scale else "served_rps": planned.bound},
        "optimality_gap": planned.optimality_gap,
        "table_seconds": found.table_s,
        "solve_seconds": found.solve_s,
        "notes": list(found.notes),
        "vllm": vllm_commands(found),
    }


def vllm_commands(found: PlanResult) -> list[str]:
    """Plain ``vllm serve`` lines that run the same replicas, on ports from 8001."""
    known = {device.id: device for device in found.request.devices}
    return [
        _command(spec, found.request.model, _FIRST_PORT + index, known)
        for index, spec in enumerate(found.plan.replicas)
    ]


def _command(spec: ReplicaSpec, model: str, port: int, known: dict[str, Device]) -> str:
    shape = spec.shape
    words = ["vllm", "serve", model, "--port", str(port)]
    for flag, value in (
        ("--tensor-parallel-size", shape.tensor_parallel_size),
        ("--pipeline-parallel-size", shape.pipeline_parallel_size),
    ):
        if value > 1:
            words += [flag, str(value)]
    words += ["--max-num-batched-tokens", str(shape.max_num_batched_tokens)]
    words += ["--max-num-seqs", str(shape.max_num_seqs)]
    words += _DTYPES.get(shape.precision, _QUANTISED.get(shape.precision, ()))
    if shape.precision in {Precision.INT8, Precision.INT4}:
        words[2] = f"{model}-{shape.precision}"
    if shape.kv_cache_memory_bytes:
        words += ["--kv-cache-memory-bytes", str(shape.kv_cache_memory_bytes)]
    nodes = sorted({known[name].node for name in spec.devices})
    if len(nodes) > 1:
        return f"{shlex.join(words)} --distributed-executor-backend ray  # on {', '.join(nodes)}"
    own = [name.rpartition("/")[2] for name in spec.devices]
    where = "" if nodes == ["local"] else f"  # on {nodes[0]}"
    if own[0].startswith("gpu:"):
        visible = ",".join(name.partition(":")[2] for name in own)
        return f"CUDA_VISIBLE_DEVICES={visible} {shlex.join(words)}{where}"
    return shlex.join(words) + where


def verdict(found: PlanResult) -> str:
    """What the plan carries by the linear model, beside the best homogeneous deployment."""
    score, base = found.planned.best.score, found.baseline.score
    gap = found.planned.optimality_gap
    proof = "proved optimal" if gap <= 1e-4 else f"within {gap:.2%} of the bound"
    if found.planned.bounds_scale:
        return (
            f"it carries {score.scale:.2f} times the demand ({proof}, linear model); "
            f"the best homogeneous deployment carries {base.scale:.2f} times: {_worth(found.gain)}"
        )
    return (
        f"it serves {score.served_rps:.2f} of {found.predicted.demand_rps:.2f} requests/s "
        f"({proof}, linear model); the best homogeneous deployment serves "
        f"{base.served_rps:.2f}: {_worth(found.gain)}"
    )


def _worth(gain: float) -> str:
    if gain < 1.005:
        return "heterogeneous replicas gain nothing here"
    return f"heterogeneous replicas gain {gain - 1:+.1%}"


def _replicas(found: PlanResult) -> Table:
    """The replicas, one line per group of the same shape and work."""
    table = Table("replicas", "shape", "seqs", "KV tokens", "devices", "busy", "serves")
    rows: dict[tuple[Any, ...], list[ReplicaSpec]] = {}
    evenly = all(
        set(shares.values()) == {1 / len(found.plan.replicas)}
        for shares in found.placed.routing_shares.values()
    )
    for spec in found.plan.replicas:
        serves: tuple[str, ...] = tuple(
            f"{kind} {shares[spec.id]:.0%}"
            for kind, shares in found.placed.routing_shares.items()
            if shares.get(spec.id, 0.0) >= 0.005
        )
        if evenly:
            serves = (f"every type {1 / len(found.plan.replicas):.0%}",)
        busy = round(found.placed.utilisation[spec.id], 3)
        rows.setdefault((spec.shape, busy, serves), []).append(spec)
    room = {option.shape: option.kv_tokens for option in found.problem.options}
    for (shape, busy, serves), specs in rows.items():
        names = [name for spec in specs for name in spec.devices]
        table.add_row(
            f"{len(specs)} x",
            f"{shape.name} on {shape.device_kind}",
            str(shape.max_num_seqs),
            f"{room.get(shape, 0):,}",
            _span(names),
            f"{busy:.0%}",
            "; ".join(f"{item} each" if len(specs) > 1 else item for item in serves) or "nothing",
        )
    return table


def _span(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)})"


def _comparison(found: PlanResult) -> Table:
    table = Table("linear model", "replicas", "x demand", "within SLO rps", "served rps", "devices")

    def add(name: str, item: DeploymentCandidate, predicted: PredictedRates | None) -> None:
        shapes = used_shapes(found.problem, item)
        table.add_row(
            name,
            ", ".join(f"{count} x {_label(shape)}" for shape, count in shapes),
            f"{item.score.scale:.2f}",
            f"{item.score.served_rps:.2f}",
            "" if predicted is None else f"{predicted.served_rps:.2f}",
            str(item.score.device_count),
        )

    add("this plan", found.planned.best, found.predicted)
    add("best homogeneous", found.baseline, found.baseline_predicted)
    if found.usual is not None:
        add("the usual default", found.usual, None)
    return table


def _label(shape: ReplicaShape) -> str:
    return f"{shape.name}/{shape.max_num_seqs}"


def _explain(found: PlanResult, console: Console) -> None:
    problem, best = found.problem, found.planned.best
    table = Table(
        "type", "in", "out", "rps", "price", "best shapes for it alone (rps a device, bound by)"
    )
    for index, kind in enumerate(problem.types):
        order = sorted(
            (option for option in problem.options if option.capacity_rps[index] > 0),
            key=lambda option, i=index: -option.capacity_rps[i] / option.shape.device_count,  # type: ignore[misc]
        )
        distinct = {option.shape.name: option for option in reversed(order)}
        first = sorted(distinct.values(), key=order.index)[:3]
        table.add_row(
            kind.name,
            f"{kind.prompt_tokens:,.0f}",
            f"{kind.output_tokens:,.0f}",
            f"{kind.arrival_rate_rps:.2f}",
            f"{best.assignment.price[index]:.4f}",
            "; ".join(
                f"{option.shape.name} {option.capacity_rps[index] / option.shape.device_count:.2f}"
                f" ({option.bound_by[index]})"
                for option in first
            ),
        )
    console.print(table)
    console.print(
        "Price: the increase of the peak utilisation per further request/s of the type.",
        markup=False,
    )
    _alternatives(found, console)
    assignment = best.assignment
    for label, options in (("at the peak", assignment.saturated), ("with slack", assignment.slack)):
        names = ", ".join(_label(problem.options[index].shape) for index in options)
        console.print(f"Replicas {label}: {names or 'none'}", markup=False)
    console.print(
        f"Search: {found.planned.search}, table of {len(problem.options)} shapes in "
        f"{found.table_s:.2f} s, solved in {found.solve_s:.2f} s; gap "
        f"{found.planned.optimality_gap:.2%}. Weights to move from the current plan: "
        f"{found.placed.moved_fraction:.2f} copies of the model.",
        markup=False,
    )


def _alternatives(found: PlanResult, console: Console) -> None:
    table = Table("also considered", "replicas", "x demand", "within SLO rps")
    for name, items in (
        ("next best", found.planned.candidates),
        ("homogeneous", found.planned.homogeneous),
    ):
        for item in items[:_SHOWN]:
            shapes = used_shapes(found.problem, item)
            table.add_row(
                name,
                ", ".join(f"{count} x {_label(shape)}" for shape, count in shapes),
                f"{item.score.scale:.3f}",
                f"{item.score.served_rps:.2f}",
            )
    console.print(table)


def _shape(shape: ReplicaShape) -> dict[str, Any]:
    return {
        "tensor_parallel_size": shape.tensor_parallel_size,
        "pipeline_parallel_size": shape.pipeline_parallel_size,
        "precision": shape.precision.value,
        "max_num_batched_tokens": shape.max_num_batched_tokens,
        "max_num_seqs": shape.max_num_seqs,
        "device_kind": shape.device_kind,
    }


def _predicted(predicted: PredictedRates) -> dict[str, float]:
    return {
        "served_rps": predicted.served_rps,
        "demand_rps": predicted.demand_rps,
        "goodput_rps": predicted.goodput_rps,
    }


def _other(found: PlanResult, item: DeploymentCandidate) -> dict[str, Any]:
    return {
        "replicas": [
            {"shape": _shape(shape), "count": count}
            for shape, count in used_shapes(found.problem, item)
        ],
        "scale": item.score.scale,
        "goodput_rps": item.score.served_rps,
        "devices": item.score.device_count,
    }
