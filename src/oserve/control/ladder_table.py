"""A ladder as a table: the deployment that the objective chooses at each load."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oserve.control.ladder import (
    Goal,
    Ladder,
    LoadScore,
    Shapes,
    device_count,
    in_words,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRow:
    """The rung at one load: its deployment, whether it holds the SLO, and its score there."""

    load: float
    rate_rps: float
    shapes: Shapes
    devices: int
    holds: bool
    cost: float
    score: LoadScore

    @property
    def power_w(self) -> float:
        """Of the devices that the deployment holds, on average."""
        return self.rate_rps * self.score.joules


def ladder_rows(
    ladder: Ladder, goal: Goal, loads: Sequence[float], *, headroom: float = 1.0
) -> tuple[LadderRow, ...]:
    """The rungs at these loads, each holding ``headroom`` times its load.

    Among equals a rung keeps the deployment of the one below.
    """
    rows: list[LadderRow] = []
    for load in loads:
        near = rows[-1].shapes if rows else ()
        rung = ladder.choose(goal, required=headroom * load, expected=load, near=near)
        found = ladder.deployments[rung.index]
        rows.append(
            LadderRow(
                load=load,
                rate_rps=load * ladder.reference_rps,
                shapes=found.shapes,
                devices=device_count(found.shapes),
                holds=rung.holds,
                cost=rung.cost,
                score=found.at(load),
            )
        )
    return tuple(rows)


def ladder_document(ladder: Ladder, goal: Goal, *, headroom: float = 1.0) -> dict[str, Any]:
    """JSON values for status documents: the rungs at the ladder's loads."""
    capacities = [ladder.capacity(index, goal) for index in range(len(ladder.deployments))]
    return {
        "objectives": dict(
            zip(ladder.names, (item.value for item in goal.objectives), strict=True)
        ),
        "attainment": goal.attainment,
        "headroom": headroom,
        "deployments": len(ladder.deployments),
        "reference_rps": ladder.reference_rps,
        "capacity_rps": max(capacities, default=0.0) * ladder.reference_rps,
        "rungs": [
            row_document(row) for row in ladder_rows(ladder, goal, ladder.loads, headroom=headroom)
        ],
    }


def row_document(row: LadderRow) -> dict[str, Any]:
    """One rung as JSON values; latencies in seconds, energy in joules per request."""
    score = row.score
    return {
        "load": row.load,
        "rate_rps": row.rate_rps,
        "deployment": in_words(row.shapes),
        "devices": row.devices,
        "holds": row.holds,
        "cost": row.cost,
        "slo_attainment": score.attainment,
        "p50_e2e_s": score.p50_e2e_s,
        "p99_e2e_s": score.p99_e2e_s,
        "p50_ttft_s": score.p50_ttft_s,
        "p99_ttft_s": score.p99_ttft_s,
        "joules_per_request": score.joules,
        "power_w": row.power_w,
    }
