"""The ladder of a running server: its rungs, the place on it, and why."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from oserve.control.decision import Reason

WHY = {
    Reason.NO_DATA: "no request has come yet",
    Reason.NO_LADDER: "the ladder is being prepared",
    Reason.SAME_PLAN: "the deployment fits the load",
    Reason.OVERLOADED: "more comes than the deployment holds, and no other holds more",
    Reason.SWITCH_UNDER_WAY: "a switch is under way",
    Reason.HELD: "an operator's plan stays for a while (control.hold_s)",
    Reason.LOAD_RISES: "the deployment does not hold the load that may come; another one does",
    Reason.MINIMUM_DWELL: "the last switch was a short while ago (control.min_dwell_s)",
    Reason.SWITCH_LIMIT: "there were enough switches this hour (control.max_switches_per_hour)",
    Reason.GAIN_TOO_SMALL: "another deployment gains too little (control.min_gain)",
    Reason.NOT_LONG_ENOUGH: "another deployment has not been better for long enough to pay",
    Reason.OBJECTIVE_GAINS: "another deployment has been better for long enough to pay",
    Reason.ZERO_TRAFFIC: "no request has come for a while (control.shrink_after_s)",
    Reason.MANUAL: "an operator asked for it",
    Reason.NODES_CHANGED: "nodes left or came back, and this is for the devices in use",
}


def show_ladder(console: Console, control: dict[str, Any]) -> None:
    """Show the controller's ladder, if it follows one."""
    ladder = control.get("ladder")
    if not ladder or not ladder["rungs"]:
        return
    place = next(
        (item["place"] for item in reversed(control["decisions"]) if item.get("place")), None
    )
    console.print(_rungs(ladder, place))
    for line in _lines(ladder, place, control["decisions"]):
        console.print(line, markup=False, soft_wrap=True)


def _rungs(ladder: dict[str, Any], place: dict[str, Any] | None) -> Table:
    table = Table(
        *("load", "requests/s", "deployment", "P50 E2E", "P99 E2E", "J/request", "devices"),
        "place",
        title=f"Ladder: for {_aim(ladder)}",
        title_justify="left",
    )
    marks = _marks(ladder, place)
    for rungs in merged(ladder["rungs"]):
        loads = [rung["load"] for rung in rungs]
        name = rungs[0]["deployment"]
        serving = [*(["serving"] if name == ladder.get("deployment") else [])]
        table.add_row(
            _span([100 * load for load in loads], "{:.0f}") + " %",
            _span([rung["rate_rps"] for rung in rungs], "{:.2f}"),
            name if all(rung["holds"] for rung in rungs) else f"{name} (does not hold)",
            _span([rung["p50_e2e_s"] for rung in rungs], "{:.2f}") + " s",
            _span([rung["p99_e2e_s"] for rung in rungs], "{:.2f}") + " s",
            _span([rung["joules_per_request"] for rung in rungs], "{:,.0f}"),
            str(rungs[0]["devices"]),
            ", ".join([*serving, *(mark for mark, load in marks if load in loads)]),
        )
    return table


def merged(rungs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours with the same deployment together, those that do not hold apart."""
    groups: list[list[dict[str, Any]]] = []
    for rung in rungs:
        last = groups[-1][-1] if groups else None
        if last and all(last[key] == rung[key] for key in ("deployment", "holds")):
            groups[-1].append(rung)
        else:
            groups.append([rung])
    return groups


def _marks(ladder: dict[str, Any], place: dict[str, Any] | None) -> list[tuple[str, float]]:
    """What is marked, each with the load of its rung: the first that is not below."""
    loads = [rung["load"] for rung in ladder["rungs"]]
    marked = [("now", ladder.get("load"))]
    if place is not None:
        marked.append(("expected", place["expected_load"]))
        # A rung holds the headroom beyond its own load.
        marked.append(("required", place["required_load"] / ladder["headroom"]))
    return [
        (mark, next((rung for rung in loads if rung >= load), loads[-1]))
        for mark, load in marked
        if load is not None
    ]


def _lines(
    ladder: dict[str, Any], place: dict[str, Any] | None, decisions: Sequence[dict[str, Any]]
) -> list[str]:
    words = f"load now {ladder.get('load', 0.0):.0%} of {ladder['reference_rps']:.2f} requests/s"
    if place is not None:
        words += (
            f", expected {place['expected_load']:.0%}, required {place['required_load']:.0%} "
            f"(with headroom {ladder['headroom']:g})"
        )
    lines = [f"{words}; serving {ladder.get('deployment', 'unknown')}"]
    last = decisions[-1] if decisions else None
    if last is not None:
        why = WHY.get(last["reason"], last["reason"])
        wanted = "" if not last.get("place") else f"; the rung is {last['place']['rung']}"
        lines.append(f"last decision: {last['verdict']}, {why}{wanted}")
    return lines


def _aim(ladder: dict[str, Any]) -> str:
    objectives = ladder["objectives"]
    if len(set(objectives.values())) == 1:
        return str(next(iter(objectives.values())))
    return ", ".join(f"{objective} of {name}" for name, objective in objectives.items())


def _span(values: Sequence[float], form: str) -> str:
    """The range of values as text; one value if both ends read alike."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
