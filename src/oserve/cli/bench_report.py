"""The report of ``oserve bench``, as data and on the screen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from oserve.cli.target import BenchTarget
from oserve.core import Tier
from oserve.traces import Outcome, OutcomeStatus, Percentiles, Slo, Summary
from oserve.traces.metrics import percentile, percentiles

_MOST_ERRORS = 8


def document(
    outcomes: Sequence[Outcome],
    summary: Summary,
    bounds: list[int] | None,
    *,
    trace: str,
    target: BenchTarget,
    rate_scale: float,
    limit: int | None,
    tiers: Sequence[Tier] = (),
) -> dict[str, Any]:
    """The report as JSON-ready data; times are seconds. ``bounds`` of None: terciles.

    ``tiers``: limits to judge each tier by.
    """
    return {
        "trace": trace,
        "url": target.url,
        "model": target.model,
        "rate_scale": rate_scale,
        "limit": limit,
        "notes": list(target.dialect.notes),
        **asdict(summary),
        "classes": _by_class(outcomes, bounds),
        "tiers": _by_tier(outcomes, tiers),
        "errors": dict(
            Counter(item.error for item in outcomes if item.error).most_common(_MOST_ERRORS)
        ),
    }


def per_request(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per request, in order of due times."""
    return [asdict(item) for item in sorted(outcomes, key=lambda item: item.due_s)]


def _by_class(outcomes: Sequence[Outcome], bounds: list[int] | None) -> list[dict[str, Any]]:
    """TTFT by class of prompt length, since a mean over all hides which requests wait."""
    done = [item for item in outcomes if item.status is OutcomeStatus.COMPLETED]
    if bounds is None:
        lengths = [float(item.prompt_tokens) for item in done]
        bounds = sorted({round(percentile(lengths, share)) for share in (1 / 3, 2 / 3)})
    rows = []
    low = 0
    for high in [*bounds, None]:
        members = [
            item
            for item in done
            if item.prompt_tokens > low and (high is None or item.prompt_tokens <= high)
        ]
        rows.append(
            {
                "prompt_tokens_over": low,
                "prompt_tokens_to": high,
                "completed": len(members),
                "ttft_s": asdict(percentiles(item.ttft_s for item in members)),
                "longest_wait_s": max((item.ttft_s for item in members), default=0.0),
            }
        )
        low = high or 0
    return rows


def _by_tier(outcomes: Sequence[Outcome], tiers: Sequence[Tier]) -> list[dict[str, Any]]:
    """Latencies of each tier that the requests name, and the share within its limits."""
    limits = {
        tier.name: Slo(ttft_s=tier.ttft_s, tpot_s=tier.tpot_s, e2e_s=tier.e2e_s) for tier in tiers
    }
    rows = []
    for name in dict.fromkeys([*limits, *sorted({item.tier for item in outcomes} - {""})]):
        own = [item for item in outcomes if item.tier == name]
        done = [item for item in own if item.status is OutcomeStatus.COMPLETED]
        slo = limits.get(name, Slo())
        rows.append(
            {
                "tier": name,
                "sent": len(own),
                "completed": len(done),
                "attainment": sum(slo.met_by(item) for item in own) / max(1, len(own)),
                "ttft_s": asdict(percentiles(item.ttft_s for item in done)),
                "tpot_s": asdict(
                    percentiles(item.tpot_s for item in done if item.tpot_s is not None)
                ),
            }
        )
    return rows


def show(report: dict[str, Any], summary: Summary) -> None:
    """Print the report on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    verdict = (
        "[green]all complete[/]" if summary.completed == summary.sent else "[red]incomplete[/]"
    )
    kinds = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in summary.failures.items())
    console.print(
        f"{summary.sent} sent, {summary.completed} completed, {summary.failed} failed"
        f"{f' ({kinds})' if kinds else ''}, {summary.truncated} truncated: {verdict}"
    )
    console.print(
        f"{summary.duration_s:.1f} s, {summary.requests_per_s:.2f} requests/s, "
        f"{summary.prompt_tokens_per_s:.0f} prompt and {summary.output_tokens_per_s:.0f} output "
        f"tokens/s, goodput {summary.goodput_rps:.2f} requests/s, SLO attainment "
        f"{summary.slo_attainment:.1%}"
    )
    table = Table("seconds", "mean", "p50", "p90", "p95", "p99", "max")
    rows = [("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s)]
    if summary.first_answer_s is not None:
        rows.insert(1, ("first answer token", summary.first_answer_s))
    rows += [("ITL", summary.itl_s), ("E2E", summary.e2e_s)]
    for name, values in rows:
        table.add_row(name, *(f"{value:.4f}" for value in asdict(values).values()))
    console.print(table)
    apart = Table("prompt tokens", "requests", "TTFT p50", "p90", "p99", "longest wait")
    for row in report["classes"]:
        high = row["prompt_tokens_to"]
        span = f"{row['prompt_tokens_over'] + 1} to {high}" if high else "longer"
        values = Percentiles(**row["ttft_s"])
        cells = (values.p50, values.p90, values.p99)
        wait = f"{row['longest_wait_s']:.3f}"
        apart.add_row(span, str(row["completed"]), *(f"{value:.4f}" for value in cells), wait)
    console.print(apart)
    if report["tiers"]:
        by_tier = Table("tier", "requests", "within limits", "TTFT p50", "p99", "TPOT p50", "p99")
        for row in report["tiers"]:
            first, each = Percentiles(**row["ttft_s"]), Percentiles(**row["tpot_s"])
            times = [f"{value:.4f}" for value in (first.p50, first.p99, each.p50, each.p99)]
            by_tier.add_row(row["tier"], str(row["sent"]), f"{row['attainment']:.1%}", *times)
        console.print(by_tier)
    if summary.reasoning_tokens:
        console.print(f"{summary.reasoning_tokens:,} output tokens were reasoning")
    if summary.max_send_lag_s > 0.1:
        console.print(f"[yellow]this client lagged by up to {summary.max_send_lag_s:.2f} s[/]")
    for error, count in report["errors"].items():
        console.print(f"{count} x {error}", markup=False)
