"""Reports of a comparison: JSON-ready data, and one self-contained HTML page."""

import html
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from oserve.evaluate.simulator import class_indices
from oserve.study.charts import COLOURS, Axes, Line, area_chart, legend, line_chart
from oserve.study.compare import QUANTILES, Row
from oserve.study.groups import jain_index
from oserve.study.policies import POLICIES
from oserve.study.scene import Scene

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;
color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child,td.left{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:8px}
svg{width:100%;font:11px system-ui,sans-serif}.grid{stroke:#e6e6e6}.mark{stroke:#b2182b;
stroke-dasharray:5 4}.title{font-weight:600;font-size:13px}.mid{text-anchor:middle}
.end{text-anchor:end}.key{display:inline-block;margin-right:14px;font-size:13px}
.key i{display:inline-block;width:12px;height:12px;margin-right:5px;border-radius:2px}
p.note{color:#555;font-size:13px}
"""


def row_document(row: Row) -> dict[str, Any]:
    """One policy as JSON-ready data; times are seconds."""
    return {
        "policy": row.policy,
        "deployment": _words(row.deployment),
        "levers": row.levers,
        "p50_e2e_s": row.p50_e2e_s,
        "p99_e2e_s": row.p99_e2e_s,
        "p50_ttft_s": row.p50_ttft_s,
        "p99_ttft_s": row.p99_ttft_s,
        "p50_tpot_s": row.p50_tpot_s,
        "p99_tpot_s": row.p99_tpot_s,
        "throughput_rps": row.throughput_rps,
        "goodput_rps": row.goodput_rps,
        "slo_attainment": row.slo_attainment,
        "max_rate_scale": row.max_rate_scale,
        "device_hours": row.device_hours,
        "energy_joules": row.energy_joules,
        "switches": row.switches,
        "lost": row.lost,
        "replayed": row.replayed,
        "points": [
            {
                "rate_scale": point.rate_scale,
                "slo_attainment": point.slo_attainment,
                "p50_e2e_s": point.p50_e2e_s,
                "p99_e2e_s": point.p99_e2e_s,
            }
            for point in row.points
        ],
        **_groups(row),
    }


def _groups(row: Row) -> dict[str, Any]:
    """Results by tier and by tenant, where there are any."""
    found: dict[str, Any] = {}
    if row.tiers:
        found["tiers"] = [asdict(own) for own in row.tiers]
    if row.tenants:
        found["tenants"] = [asdict(own) for own in row.tenants]
        found["jain_index"] = jain_index(row.tenants)
    return found


def document(scene: Scene, rows: Sequence[Row], *, rate_scale: float) -> dict[str, Any]:
    """The whole comparison as JSON-ready data."""
    return {
        "model": scene.model,
        "devices": len(scene.devices),
        "performance": scene.source.origin,
        "trace": scene.demand.source,
        "requests": len(scene.traffic),
        "rate_rps": scene.traffic.rate_rps * rate_scale,
        "rate_scale": rate_scale,
        "slo": {"ttft_s": scene.slo.ttft_s, "tpot_s": scene.slo.tpot_s, "attainment": 0.95},
        "interval_s": scene.interval_s,
        "learned_s": scene.learn_s,
        "seed": scene.seed,
        "classes": [
            {
                "name": item.name,
                "max_prompt_tokens": item.max_prompt_tokens,
                "expected_output_tokens": item.output_tokens,
            }
            for item in scene.demand.classes
        ],
        "notes": [*scene.demand.notes],
        "policies": [row_document(row) for row in rows],
    }


def page(scene: Scene, rows: Sequence[Row], *, rate_scale: float) -> str:
    """The comparison as one self-contained HTML page."""
    colours = {row.policy: COLOURS[at % len(COLOURS)] for at, row in enumerate(rows)}
    names = [row.policy for row in rows]
    charts = [
        *_distributions(scene, rows, colours),
        *_timelines(scene, rows, colours, rate_scale),
        *_against_rate(rows, colours),
    ]
    title = f"{scene.model} on {len(scene.devices)} devices"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{_facts(scene, rate_scale)}"
        f"{_table(rows)}<h2>Policies</h2>{_policies(rows)}<h2>Pictures</h2>"
        f'<p>{legend(names, colours)}</p><div class="charts">{"".join(charts)}</div></html>'
    )


def _facts(scene: Scene, rate_scale: float) -> str:
    slo = scene.slo
    limits = ", ".join(
        f"{name} at most {value:g} s"
        for name, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if value is not None
    )
    rate = scene.traffic.rate_rps * rate_scale
    learned = (
        "all of it, in hindsight" if scene.learn_s is None else f"its first {scene.learn_s:g} s"
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in scene.demand.notes)
    return (
        f"<p>{len(scene.traffic):,} requests of {html.escape(scene.demand.source)}, replayed "
        f"{rate_scale:g} times as fast ({rate:.1f} requests/s); SLO: {limits} for 95 % of all "
        f"requests. Step times: {html.escape(scene.source.origin)}. Settings were searched on "
        f"{learned}. Maximum scale: the fastest replay at which the SLO still holds.</p>{notes}"
    )


def _table(rows: Sequence[Row]) -> str:
    heads = (
        "policy", "max scale", "SLO met", "goodput rps", "P50 E2E s", "P99 E2E s", "P99 TTFT s",
        "P99 TPOT ms", "device hours", "MJ", "switches", "lost", "replayed",
    )  # fmt: skip
    lines = []
    for row in rows:
        cells = (
            row.policy,
            "" if row.max_rate_scale is None else f"{row.max_rate_scale:.2f}",
            f"{row.slo_attainment:.1%}",
            f"{row.goodput_rps:.2f}",
            f"{row.p50_e2e_s:.2f}",
            f"{row.p99_e2e_s:.2f}",
            f"{row.p99_ttft_s:.2f}",
            f"{row.p99_tpot_s * 1e3:.0f}",
            f"{row.device_hours:.1f}",
            f"{row.energy_joules / 1e6:.1f}",
            str(row.switches),
            str(row.lost),
            str(row.replayed),
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _policies(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        levers = ", ".join(f"{name} {value}" for name, value in row.levers.items())
        words = (row.policy, POLICIES[row.policy].words, _words(row.deployment), levers)
        cells = "".join(f'<td class="left">{html.escape(word)}</td>' for word in words)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _distributions(scene: Scene, rows: Sequence[Row], colours: dict[str, str]) -> list[str]:
    charts = []
    limits = {"ttft_s": scene.slo.ttft_s, "tpot_s": scene.slo.tpot_s, "e2e_s": None}
    for name, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E")):
        lines = [
            Line(
                name=row.policy,
                points=[
                    (max(value, 1e-4), share)
                    for value, share in zip(row.quantiles[name], QUANTILES, strict=False)
                ],
            )
            for row in rows
        ]
        axes = Axes(
            title=f"{title}: share of requests below",
            x="seconds",
            y="share",
            log_x=True,
            mark_x=limits[name],
        )
        charts.append(line_chart(axes, lines, colours=colours))
    return charts


def _timelines(
    scene: Scene, rows: Sequence[Row], colours: dict[str, str], rate_scale: float
) -> list[str]:
    traffic = scene.traffic.faster(rate_scale)
    classes = scene.demand.classes
    index = class_indices(classes, traffic.prompt_tokens)
    step_s = max(scene.interval_s, traffic.duration_s / 120)
    edges = np.arange(0.0, traffic.duration_s + step_s, step_s)
    layers = []
    for at, item in enumerate(classes):
        counts, _ = np.histogram(traffic.arrival_s[index == at], edges)
        points = [(float(x), float(v)) for x, v in zip(edges, counts / step_s, strict=False)]
        layers.append(Line(name=item.name, points=points))
    mix = Axes(title="Mix: arrivals by length class", x="seconds", y="requests/s")
    kept = [float(edge) for edge in edges[: len(layers[0].points)]]
    queue = Axes(title="Requests waiting for their first token", x="seconds", y="requests")
    replicas = Axes(title="Devices by plan (a step is a switch)", x="seconds", y="replicas")
    return [
        area_chart(mix, kept, layers),
        line_chart(queue, [Line(name=r.policy, points=r.queue) for r in rows], colours=colours),
        line_chart(
            replicas,
            [
                Line(
                    name=row.policy,
                    points=[
                        *((at_s, sum(count for _, count in plan)) for at_s, plan in row.changes),
                        (traffic.duration_s, sum(count for _, count in row.changes[-1][1])),
                    ],
                    steps=True,
                )
                for row in rows
            ],
            colours=colours,
        ),
    ]


def _against_rate(rows: Sequence[Row], colours: dict[str, str]) -> list[str]:
    if all(len(row.points) < 2 for row in rows):
        return []
    base = {point.rate_scale: point for point in rows[0].points}
    gains = [
        Line(
            name=row.policy,
            points=[
                (p.rate_scale, base[p.rate_scale].p99_e2e_s / p.p99_e2e_s)
                for p in row.points
                if p.p99_e2e_s > 0 and p.rate_scale in base
            ],
        )
        for row in rows
    ]
    kept = [
        Line(name=row.policy, points=[(p.rate_scale, p.slo_attainment) for p in row.points])
        for row in rows
    ]
    first = rows[0].policy
    return [
        line_chart(
            Axes(title="SLO attainment against rate", x="rate scale", y="share", mark_y=0.95),
            kept,
            colours=colours,
        ),
        line_chart(
            Axes(
                title=f"P99 E2E of {first} over that of each, against rate",
                x="rate scale",
                y="times",
                mark_y=1.0,
            ),
            gains,
            colours=colours,
        ),
    ]


def _words(deployment: Sequence[tuple[str, int]]) -> str:
    return " + ".join(f"{count} x {name}" for name, count in deployment)
