"""The report of a plan's ladder: tables, lines and JSON."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from oserve.control.ladder import LoadScore, device_count, in_words
from oserve.control.ladder_table import LadderRow, row_document
from oserve.core import Objective
from oserve.evaluate.plan_ladder import ModelledLatency, PlanLadder
from oserve.plan.planning import PlanResult

_OBJECTIVES = {
    Objective.LATENCY: "the least latency",
    Objective.ENERGY: "the least energy",
    Objective.CAPACITY: "the most capacity",
}


def verdicts(answer: PlanLadder, capacity: str) -> list[str]:
    """What the chosen deployment does at the peak; ``capacity``: the verdict on that plan."""
    rate_rps = answer.ladder.reference_rps
    words = f"chosen for {_aims(answer)} at {rate_rps:.2f} requests/s ({answer.peak.peak})"
    if answer.holds:
        return [words, f"the plan for capacity: {capacity}"]
    in_time = f"{answer.at(answer.chosen).attainment:.1%} of requests are in time"
    fault = f"it does not hold the SLO at {answer.headroom:g} times that rate"
    if answer.chosen != answer.capacity:
        return [
            words,
            f"{fault}, as no deployment does: {in_time} at the rate itself",
            f"the plan for capacity: {capacity}",
        ]
    most = max(range(len(answer.held)), key=lambda index: answer.held[index])
    better = in_words(answer.ladder.deployments[most].shapes)
    return [
        words,
        f"the linear model: {capacity}",
        f"simulated, {fault}: {in_time} at the rate itself"
        + (
            f"; {better} holds {answer.held[most]:.0%} of it (--verify chooses by simulation)"
            if answer.held[most] > answer.held[answer.chosen]
            else ""
        ),
    ]


def show(answer: PlanLadder, console: Console) -> None:
    """Print the ladder for people."""
    console.print(_rungs(answer))
    console.print(_beside(answer))
    for line in _lines(answer):
        console.print(line, markup=False)


def document(answer: PlanLadder) -> dict[str, Any]:
    """The ladder as JSON-ready data; latencies in seconds, energy in joules per request."""
    ladder, goal = answer.ladder, answer.goal
    return {
        "objectives": dict(
            zip(ladder.names, (item.value for item in goal.objectives), strict=True)
        ),
        "attainment": goal.attainment,
        "headroom": answer.headroom,
        "peak": answer.peak.peak,
        "peak_rps": ladder.reference_rps,
        "traffic": answer.peak.words,
        "mean_load": answer.peak.mean_load,
        "holds": answer.holds,
        "rungs": [row_document(row) for row in answer.rows],
        "chosen": _deployment(answer, answer.chosen),
        "capacity_plan": _deployment(answer, answer.capacity),
        "best_homogeneous": _deployment(answer, answer.homogeneous),
        "linear_model": _model_errors(answer),
        "simulations": answer.simulations,
        "simulation_seconds": answer.seconds,
    }


def title(answer: PlanLadder, found: PlanResult) -> str:
    """The heading of a plot."""
    devices = len(found.request.devices)
    return (
        f"{found.request.model} on {devices} devices: the deployment for {_aims(answer)}\n"
        f"that holds {answer.headroom:g} times the load within the SLO"
    )


# -- tables -------------------------------------------------------------------------------------
def _rungs(answer: PlanLadder) -> Table:
    table = Table(
        *("of peak", "requests/s", "deployment", "P50 E2E", "P99 E2E", "in SLO (worst type)"),
        *("J/request", "kW", "devices"),
        title=f"Ladder: the deployment for {_aims(answer)} at each load",
        title_justify="left",
    )
    before = None
    for row in answer.rows:
        held = "" if row.holds else f" ({_fault(answer, row)})"
        same = row.shapes == before
        before = row.shapes
        table.add_row(
            f"{row.load:.0%}",
            f"{row.rate_rps:.2f}",
            ("  same" if same else in_words(row.shapes)) + held,
            *_measures(row),
            str(row.devices),
        )
    return table


def _fault(answer: PlanLadder, row: LadderRow) -> str:
    index = answer.ladder.find(row.shapes)
    within = index is not None and answer.holds_at(index, row.load)
    return "no headroom" if within else "does not hold"


def _measures(row: LadderRow) -> tuple[str, ...]:
    score = row.score
    return (
        f"{score.p50_e2e_s:.2f} s",
        f"{score.p99_e2e_s:.2f} s",
        _in_time(score),
        f"{score.joules:,.0f}",
        f"{row.power_w / 1e3:.1f}",
    )


def _beside(answer: PlanLadder) -> Table:
    """The chosen deployment, the plan for capacity and the best homogeneous one at the peak."""
    table = Table(
        *(
            "at the peak",
            "deployment",
            "P50 E2E",
            "P99 E2E",
            "in SLO (worst type)",
            "J/request",
            "devices",
        ),
        "holds up to",
    )
    for name, index in (
        ("this plan", answer.chosen),
        ("plan for capacity", answer.capacity),
        ("best homogeneous", answer.homogeneous),
    ):
        score = answer.at(index)
        shapes = answer.ladder.deployments[index].shapes
        table.add_row(
            name,
            in_words(shapes),
            f"{score.p50_e2e_s:.2f} s",
            f"{score.p99_e2e_s:.2f} s",
            _in_time(score),
            f"{score.joules:,.0f}",
            str(device_count(shapes)),
            _capacity(answer, index),
        )
    return table


def _capacity(answer: PlanLadder, index: int) -> str:
    held = answer.held[index]
    sign = ">" if held >= answer.ladder.loads[-1] - 0.01 else ""
    return f"{sign}{held:.0%} of peak"


def _lines(answer: PlanLadder) -> list[str]:
    slo = answer.slo
    limits = [
        f"{name} {value:g} s"
        for name, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if value is not None
    ]
    within = " and ".join(limits) or "five times their latency on an idle cluster (no SLO is given)"
    lines = [
        f"Simulated with {answer.peak.words}; {answer.simulations} simulations in "
        f"{answer.seconds:.0f} s. Each rung holds {answer.headroom:g} times its load: "
        f"{answer.goal.attainment:.0%} of requests, of each type too, within {within}.",
    ]
    errors = _errors(answer.latencies)
    if errors:
        worst = max(answer.latencies, key=lambda item: abs(item.error))
        lines.append(
            "The linear model only proposes the plan for capacity: its mean E2E by type is off by "
            f"{np.median(errors):.0%} (median), at worst {worst.error:+.0%} "
            f"({worst.name}, {worst.load:.0%} of the peak)."
        )
    return lines


# -- parts --------------------------------------------------------------------------------------
def _aims(answer: PlanLadder) -> str:
    """The objectives in words."""
    objectives = answer.goal.objectives
    if len(set(objectives)) == 1:
        return _OBJECTIVES[objectives[0]]
    return ", ".join(
        f"{_OBJECTIVES[item]} of {name}"
        for name, item in zip(answer.ladder.names, objectives, strict=True)
    )


def _in_time(score: LoadScore) -> str:
    return f"{score.attainment:.1%} ({min(score.type_attainment):.1%})"


def _deployment(answer: PlanLadder, index: int) -> dict[str, Any]:
    """A deployment at the peak."""
    score = answer.at(index)
    shapes = answer.ladder.deployments[index].shapes
    return {
        "deployment": in_words(shapes),
        "devices": device_count(shapes),
        "slo_attainment": score.attainment,
        "p50_e2e_s": score.p50_e2e_s,
        "p99_e2e_s": score.p99_e2e_s,
        "joules_per_request": score.joules,
        "holds_up_to": answer.held[index],
    }


def _errors(latencies: tuple[ModelledLatency, ...]) -> list[float]:
    return [abs(item.error) for item in latencies]


def _model_errors(answer: PlanLadder) -> dict[str, Any]:
    """How far the linear model's mean E2E is off, as relative errors."""
    by_rung = []
    for row in answer.rows:
        mine = tuple(item for item in answer.latencies if item.load == row.load)
        if mine:
            by_rung.append({"load": row.load} | _spread(mine))
    overall = _spread(answer.latencies) if answer.latencies else {}
    return overall | {"rungs": by_rung}


def _spread(latencies: tuple[ModelledLatency, ...]) -> dict[str, Any]:
    worst = max(latencies, key=lambda item: abs(item.error))
    return {
        "median_error": float(np.median(_errors(latencies))),
        "worst_error": worst.error,
        "worst_type": worst.name,
    }
