"""The report of a verified plan: the simulated score of each candidate."""

from typing import Any

from rich.console import Console
from rich.table import Table

from oserve.evaluate.verification import VerifiedAnswer
from oserve.plan.planning import PlanResult, used_shapes
from oserve.plan.verify import Rescored

_SHOWN = 15


def show(checked: VerifiedAnswer, console: Console) -> None:
    """Print the scores for people."""
    verified = checked.verified
    table = Table("by simulation", "replicas", "x demand", "linear model", "its error")
    for item in verified.scored[:_SHOWN]:
        kind = "homogeneous" if item.homogeneous else "candidate"
        table.add_row(
            f"{kind}, chosen" if item is verified.chosen else kind,
            _words(checked.answer, item),
            f"{item.scale:.2f}",
            f"{item.predicted:.2f}",
            f"{item.error:+.0%}" if item.scale > 0 else "serves nothing",
        )
    console.print(table)
    for line in _lines(checked):
        console.print(line, markup=False)


def document(checked: VerifiedAnswer) -> dict[str, Any]:
    """The scores as JSON-ready data; scales are multiples of the demand."""
    verified = checked.verified
    return {
        "traffic": checked.check.words,
        "min_gain": verified.min_gain,
        "gain": verified.gain,
        "heterogeneous": not verified.chosen.homogeneous,
        "homogeneous_left_out": verified.left_out,
        "scored": [
            {
                "replicas": _words(checked.answer, item),
                "homogeneous": item.homogeneous,
                "chosen": item is verified.chosen,
                "simulated_scale": item.scale,
                "predicted_scale": item.predicted,
                "model_error": item.error if item.scale > 0 else None,
            }
            for item in verified.scored
        ],
    }


def _lines(checked: VerifiedAnswer) -> list[str]:
    verified, slo = checked.verified, checked.check.slo
    limits = " and ".join(
        f"{name} {value:g} s"
        for name, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if value is not None
    )
    lines = [
        f"Simulated with {checked.check.words}, up to the rate at which 95 % of requests just meet "
        f"{limits}, served like oserve serve (soft pools, order by prompt length).",
        f"The best deployment gains {verified.gain - 1:+.1%} over the best homogeneous one; "
        f"heterogeneous replicas need at least {verified.min_gain:.0%}.",
        "The linear model ignores bursts, mixing and queueing, which is its error.",
    ]
    if verified.left_out:
        lines.append(
            f"{verified.left_out} homogeneous deployments were not simulated: of those that "
            "differ only in max_num_seqs, only the linear model's best was."
        )
    if len(verified.scored) > _SHOWN:
        lines.append(f"{len(verified.scored) - _SHOWN} worse ones are not shown; --json has all.")
    return lines


def _words(found: PlanResult, item: Rescored) -> str:
    return ", ".join(
        f"{count} x {shape.name}/{shape.max_num_seqs}"
        for shape, count in used_shapes(found.problem, item.deployment)
    )
