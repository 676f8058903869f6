"""The state of the page: sections of one JSON document, made of a status document.

Sections change at different paces, so a viewer gets each second those that changed. All are
bounded: more types, devices, replicas or links than the limits here are left out and counted.
Times are Unix seconds, so that what stands still stays equal. Pure.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from oserve.look.words import standing, why

MOST_TYPES = 24
MOST_DEVICES = 256
MOST_REPLICAS = 128
MOST_LINKS = 200
MOST_SWITCHES = 8
MOST_DECISIONS = 10
_MOST_NOTE = 120
_MOST_LINE = 700
_LEAST_SHARE = 0.005

StatusJson = Mapping[str, Any]
Totals = Mapping[str, float]
"""Counters since the start, by name: ``moved``, ``demoted``, ``shed``, ``failed``, ``retried``."""


class PageNow(msgspec.Struct, frozen=True, kw_only=True):
    """What changes each second. Watts, joules and load are ``None`` where unknown."""

    at_s: float
    model: str
    version: str
    plan: str
    mode: str
    standing: str
    serving: bool
    queued: int
    inflight: int
    totals: dict[str, float]
    power_w: float | None = None
    idle_power_w: float | None = None
    joules_per_token: float | None = None
    energy_sources: list[str] = []
    load: float | None = None


class PageReplica(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One replica. ``devices`` are places in the list of devices."""

    id: str
    shape: str
    phase: str
    since_s: int
    devices: list[int]
    note: str


class PageNode(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One node with its devices, as places in the list of devices."""

    name: str
    state: str
    devices: list[int]


class PageType(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The arrivals of one type and their forecast, requests/s; -1: unknown."""

    name: str
    now_rps: float
    expected_rps: float
    low_rps: float
    high_rps: float


class PageTier(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tier: limits in milliseconds (``None``: none), and what was kept since the start."""

    name: str
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    kept: int
    ended: int


class PageSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """One switch. ``phases``: seconds by phase, over all waves. Gains are in requests.

    ``expected_gain`` and ``expected_cost`` are those of the decision, if one is known.
    """

    id: str
    plan: str
    by: str
    method: str
    state: str
    reason: str
    phase: str
    wave: int
    waves: int
    moved_bytes: int
    total_bytes: int
    began_s: float
    ended_s: float | None
    phases: list[tuple[str, float]]
    expected_gain: float | None = None
    expected_cost: float | None = None
    lasts_s: float | None = None


class PageDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision with its numbers; see ``control.decision.Decision``."""

    number: int
    at_s: float
    verdict: str
    why: str
    plan: str
    candidate: str
    gain_requests: float
    cost_requests: float
    switch_s: float
    current_rps: float
    candidate_rps: float
    line: str


class PageRung(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The deployment that the objective chooses at one load; watts on average."""

    load: float
    deployment: str
    devices: int
    holds: bool
    power_w: float


class PageLadder(msgspec.Struct, frozen=True, kw_only=True):
    """The ladder, and the deployment of the present plan."""

    rungs: list[PageRung]
    deployment: str
    objectives: list[str]


class PageState(msgspec.Struct, frozen=True, kw_only=True):
    """The whole state. ``loads``: running, waiting and KV use (%) of each replica.

    ``planned``: (type, replica, share) by places in ``names`` and ``replicas``. ``hidden``: how
    many devices and replicas the limits leave out. ``slo``: limits of TTFT and TPOT in milliseconds
    for requests without a tier.
    """

    now: PageNow
    names: list[str]
    types: list[PageType]
    devices: list[tuple[str, str]]
    nodes: list[PageNode]
    replicas: list[PageReplica]
    loads: list[tuple[int, int, int]]
    planned: list[tuple[int, int, float]]
    tiers: list[PageTier]
    switches: list[PageSwitch]
    decisions: list[PageDecision]
    ladder: PageLadder | None
    hidden: tuple[int, int]
    slo: tuple[float | None, float | None] = (None, None)


def page_state(
    status: StatusJson,
    switches: Sequence[StatusJson],
    totals: Totals,
    *,
    now_s: float,
    slo: tuple[float | None, float | None] = (None, None),
) -> PageState:
    """The state at ``now_s`` Unix time. ``switches``: reports, oldest first; ``slo``: see there."""
    control = status.get("control") or {}
    decisions = (control.get("decisions") or [])[-MOST_DECISIONS:]
    devices = status.get("devices", [])
    shown = devices[:MOST_DEVICES]
    places = {item["id"]: place for place, item in enumerate(shown)}
    replicas = status.get("replicas", [])[:MOST_REPLICAS]
    types = _types(status, control)
    names = [item.name for item in types]
    hidden = (len(devices) - len(shown), len(status.get("replicas", [])) - len(replicas))
    return PageState(
        now=_now(status, control, totals, now_s),
        names=names,
        types=types,
        devices=[(str(item["id"]), str(item["kind"])) for item in shown],
        nodes=_nodes(status, shown),
        replicas=[_replica(item, places, now_s) for item in replicas],
        loads=[
            (item["running"], item["waiting"], round(100 * item["kv_cache_usage"]))
            for item in replicas
        ],
        planned=_planned(status, names, [str(item["id"]) for item in replicas]),
        tiers=[_tier(item) for item in status.get("tiers", [])],
        switches=[_switch(item, decisions) for item in switches[-MOST_SWITCHES:]],
        decisions=[_decision(item) for item in decisions],
        ladder=_ladder(control.get("ladder")),
        hidden=hidden,
        slo=slo,
    )


def _now(status: StatusJson, control: StatusJson, totals: Totals, now_s: float) -> PageNow:
    energy = status.get("energy") or {}
    gateways = status.get("gateways", [])
    ladder = control.get("ladder") or {}
    load = ladder.get("load")
    return PageNow(
        at_s=round(now_s, 1),
        model=str(status.get("model", ""))[:_MOST_NOTE],
        version=str(status.get("version", "")),
        plan=str(status.get("plan_id", "")),
        mode=str(control.get("mode", "off")),
        standing=standing(status),
        serving=bool(status.get("serving")),
        queued=sum(item.get("queued", 0) for item in gateways),
        inflight=sum(item.get("inflight", 0) for item in gateways),
        totals={name: round(value) for name, value in totals.items()},
        power_w=energy.get("power_w"),
        idle_power_w=energy.get("idle_power_w"),
        joules_per_token=energy.get("joules_per_output_token"),
        energy_sources=energy.get("sources", []),
        load=None if load is None else round(load, 3),
    )


def _types(status: StatusJson, control: StatusJson) -> list[PageType]:
    """Forecasts, or without a controller the types of the plan."""
    forecast = control.get("forecast") or []
    if not forecast:
        names = [str(item["name"]) for item in status.get("workload_types", [])]
        unknown = {"now_rps": -1.0, "expected_rps": -1.0, "low_rps": -1.0, "high_rps": -1.0}
        return [PageType(name=name, **unknown) for name in names[:MOST_TYPES]]
    return [
        PageType(
            name=str(item["name"]),
            now_rps=round(item["now_rps"], 2),
            expected_rps=round(item["expected_rps"], 2),
            low_rps=round(item["low_rps"], 2),
            high_rps=round(item["high_rps"], 2),
        )
        for item in forecast[:MOST_TYPES]
    ]


def _nodes(status: StatusJson, devices: Sequence[StatusJson]) -> list[PageNode]:
    states = {item["name"]: str(item["state"]) for item in status.get("nodes", [])}
    members: dict[str, list[int]] = {name: [] for name in states}
    for place, item in enumerate(devices):
        members.setdefault(str(item["node"]), []).append(place)
    return [
        PageNode(name=name, state=states.get(name, "up"), devices=own)
        for name, own in members.items()
        if own
    ]


def _replica(item: StatusJson, places: Mapping[str, int], now_s: float) -> PageReplica:
    shape = item["shape"]
    words = [f"TP{shape['tensor_parallel_size']}"]
    if shape["pipeline_parallel_size"] > 1:
        words.append(f"PP{shape['pipeline_parallel_size']}")
    words += [str(shape["precision"])] if not item.get("url") else []
    return PageReplica(
        id=str(item["id"]),
        shape=" ".join(words) if not item.get("url") else "attached",
        phase=str(item["phase"]),
        # Whole seconds, two apart: readings of one start differ by the round they were made in.
        since_s=2 * round((now_s - item["phase_s"]) / 2),
        devices=[places[name] for name in item["devices"] if name in places],
        note=str(item["note"] or item["detail"])[:_MOST_NOTE],
    )


def _planned(
    status: StatusJson, names: Sequence[str], replicas: Sequence[str]
) -> list[tuple[int, int, float]]:
    """The largest shares of types at replicas."""
    kinds = {name: place for place, name in enumerate(names)}
    places = {name: place for place, name in enumerate(replicas)}
    links = [
        (kinds[kind], places[replica], round(share, 3))
        for kind, shares in status.get("routing_shares", {}).items()
        for replica, share in shares.items()
        if kind in kinds and replica in places and share >= _LEAST_SHARE
    ]
    return sorted(sorted(links, key=lambda link: -link[2])[:MOST_LINKS])


def _tier(item: StatusJson) -> PageTier:
    requests = item["requests"]
    return PageTier(
        name=str(item["tier"]),
        ttft_ms=item["ttft_ms"],
        tpot_ms=item["tpot_ms"],
        e2e_ms=item["e2e_ms"],
        kept=requests.get("kept", 0),
        ended=sum(requests.values()),
    )


def _switch(item: StatusJson, decisions: Sequence[StatusJson]) -> PageSwitch:
    phases: dict[str, float] = {}
    entries = item["phases"]
    for entry, following in pairwise(entries):
        spent_s = following["at_s"] - entry["at_s"]
        phases[entry["phase"]] = phases.get(entry["phase"], 0.0) + spent_s
    if entries and item["ended_s"] is not None:
        last = entries[-1]
        spent_s = item["ended_s"] - last["at_s"]
        phases[last["phase"]] = phases.get(last["phase"], 0.0) + spent_s
    cause = _cause(item, decisions)
    return PageSwitch(
        id=str(item["id"]),
        plan=str(item["plan_id"]),
        by=str(item["by"]),
        method=str(item["method"]),
        state=str(item["state"]),
        reason=str(item["reason"])[:_MOST_NOTE],
        phase=str(item["phase"]),
        wave=item["wave"],
        waves=item["waves"],
        moved_bytes=item["moved_bytes"],
        total_bytes=item["total_bytes"],
        began_s=round(item["began_s"], 1),
        ended_s=None if item["ended_s"] is None else round(item["ended_s"], 1),
        phases=[(name, round(spent_s, 2)) for name, spent_s in phases.items()],
        expected_gain=None if cause is None else round(cause["gain_requests"], 1),
        expected_cost=None if cause is None else round(cause["cost_requests"], 1),
        lasts_s=None if cause is None else round(cause["lasts_s"]),
    )


def _cause(switch: StatusJson, decisions: Sequence[StatusJson]) -> StatusJson | None:
    """The decision that a switch carries out: the last one for its plan before it began."""
    found = None
    for item in decisions:
        same = item["verdict"] == "switch" and item["candidate_plan"] == switch["plan_id"]
        if same and item["at_s"] <= switch["began_s"] + 1.0:
            found = item
    return found


def _decision(item: StatusJson) -> PageDecision:
    return PageDecision(
        number=item["number"],
        at_s=round(item["at_s"], 1),
        verdict=str(item["verdict"]),
        why=why(item),
        plan=str(item["current_plan"]),
        candidate=str(item["candidate_plan"]),
        gain_requests=round(item["gain_requests"], 1),
        cost_requests=round(item["cost_requests"], 1),
        switch_s=round(item["switch_s"], 1),
        current_rps=round(item["current_rps"], 2),
        candidate_rps=round(item["candidate_rps"], 2),
        line=str(item.get("line", ""))[:_MOST_LINE],
    )


def _ladder(found: StatusJson | None) -> PageLadder | None:
    if found is None:
        return None
    rungs = [
        PageRung(
            load=round(item["load"], 3),
            deployment=str(item["deployment"]),
            devices=item["devices"],
            holds=item["holds"],
            power_w=round(item["power_w"], 1),
        )
        for item in found["rungs"][:32]
    ]
    objectives = sorted({str(value) for value in found["objectives"].values()})
    return PageLadder(rungs=rungs, deployment=str(found["deployment"]), objectives=objectives)
