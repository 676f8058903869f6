"""``oserve bench``: replay a trace against any OpenAI-compatible server and say how it went."""

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from oserve.cli.load import Replay, calibrated_writer, find_target, new_session
from oserve.cli.picture import draw
from oserve.config import environment_value
from oserve.core import OServeError
from oserve.traces import (
    Outcome,
    OutcomeStatus,
    Percentiles,
    Slo,
    Summary,
    TraceRequest,
    fit_lengths,
    read_trace,
    summarise,
    synthesise,
)
from oserve.traces.metrics import percentile, percentiles

_console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    url: str
    model: str
    speed: float
    chat: bool
    max_model_len: int | None
    prompt_scale: float | None
    output_scale: float | None
    api_key: str
    seed: int
    max_concurrency: int
    timeout_s: float


def bench(
    trace: Annotated[
        str | None,
        typer.Argument(help="Trace: canonical CSV, Azure CSV or Mooncake JSONL; may be gzipped."),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(help="Instead of a trace: RATE:SECONDS of made-up mixed traffic."),
    ] = None,
    url: Annotated[str, typer.Option(help="The server's base URL.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model; the server's first by default.")] = "",
    speed: Annotated[float, typer.Option(help="Replay this many times as fast.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Stop after this many requests.")] = None,
    duration: Annotated[
        float | None, typer.Option(help="Use only the trace's first seconds.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")] = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="Context to fit lengths to; the server's by default.")
    ] = None,
    prompt_scale: Annotated[
        float | None, typer.Option(help="Factor on prompt lengths; fitted by default.")
    ] = None,
    output_scale: Annotated[
        float | None, typer.Option(help="Factor on output lengths; fitted by default.")
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="SLO: time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="SLO: time per output token.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Prompt-length bounds to report apart, such as 512,2048.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="API key; or OPENAI_API_KEY.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and synthetic traffic.")] = 0,
    max_concurrency: Annotated[int, typer.Option(help="Most requests in flight.")] = 4096,
    timeout_s: Annotated[float, typer.Option(help="Give a request up after this long.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the run into this PNG.")] = None,
) -> None:
    """Replay a trace, open loop; exit code 1 if any request failed or was truncated."""
    for name, value in (("--speed", speed), ("--timeout-s", timeout_s)):
        if not 0 < value < float("inf"):
            raise OServeError(f"it is {value}", place=name, remedy="give a number over 0")
    if max_concurrency < 1:
        raise OServeError(f"it is {max_concurrency}", place="--max-concurrency", remedy="give 1+")
    wanted = _Wanted(
        url=url,
        model=model,
        speed=speed,
        chat=chat,
        max_model_len=max_model_len,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
        api_key=api_key or environment_value("OPENAI_API_KEY"),
        seed=seed,
        max_concurrency=max_concurrency,
        timeout_s=timeout_s,
    )
    requests = _requests(trace, synthetic, limit=limit, duration=duration, seed=seed)
    bounds = _bounds(classes)
    model_name, outcomes = uvloop.run(_replay(requests, wanted))
    slo = Slo(
        ttft_s=None if slo_ttft_ms is None else slo_ttft_ms / 1000.0,
        tpot_s=None if slo_tpot_ms is None else slo_tpot_ms / 1000.0,
    )
    summary = summarise(outcomes, slo)
    report = {
        "trace": trace or f"synthetic {synthetic}",
        "url": url,
        "model": model_name,
        "speed": speed,
        "limit": limit,
        **asdict(summary),
        "classes": _by_class(outcomes, bounds),
        "errors": dict(Counter(item.error for item in outcomes if item.error).most_common(8)),
    }
    if plot is not None:
        title = f"{report['trace']} at speed {speed:g} on {model_name}: {summary.completed} of "
        draw(outcomes, slo, plot, title=title + f"{summary.sent} completed")
        _console.print(f"picture: {plot}")
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        _show(report, summary)
    if summary.completed < len(requests):
        raise typer.Exit(1)


def _requests(
    trace: str | None,
    synthetic: str | None,
    *,
    limit: int | None,
    duration: float | None,
    seed: int,
) -> list[TraceRequest]:
    if (trace is None) == (synthetic is None):
        raise OServeError(
            "name a trace or --synthetic, one of the two",
            place="bench",
            remedy="for example oserve bench --synthetic 2:60",
        )
    if trace is not None:
        requests = list(read_trace(trace, limit=limit, until_s=duration))
    else:
        assert synthetic is not None
        rate, _, seconds = synthetic.partition(":")
        try:
            made = synthesise(rate_rps=float(rate), duration_s=float(seconds), seed=seed)
            requests = list(made)[:limit]
        except (ValueError, ZeroDivisionError, OverflowError):
            raise OServeError(
                f"{synthetic!r} is not RATE:SECONDS",
                place="--synthetic",
                remedy="for example 2:60 for two requests a second, for a minute",
            ) from None
    if not requests:
        raise OServeError(
            "there is no request to send",
            place=trace or "--synthetic",
            remedy="give a longer trace, or more --limit or --duration",
        )
    return requests


def _bounds(classes: str | None) -> list[int] | None:
    """Bounds as given; None for the terciles of what was replayed."""
    if classes is None:
        return None
    try:
        bounds = [int(item) for item in classes.split(",")]
    except ValueError:
        bounds = []
    if not bounds or bounds != sorted(set(bounds)) or bounds[0] < 1:
        raise OServeError(
            f"{classes!r} are not ascending lengths", place="--classes", remedy="such as 512,2048"
        )
    return bounds


async def _replay(requests: list[TraceRequest], wanted: _Wanted) -> tuple[str, list[Outcome]]:
    async with new_session() as session:
        target = await find_target(
            session,
            wanted.url,
            model=wanted.model,
            api_key=wanted.api_key,
            chat=wanted.chat,
            timeout_s=wanted.timeout_s,
        )
        context = wanted.max_model_len or target.max_model_len
        if context:
            requests = fit_lengths(
                requests,
                max_model_len=context,
                prompt_scale=wanted.prompt_scale,
                output_scale=wanted.output_scale,
                # Prompts are written by words, so their token count is only nearly exact.
                reserve_tokens=max(32, context // 50),
            )
        writer = await calibrated_writer(session, target, seed=wanted.seed)
        with _progress(len(requests)) as (bar, task):

            def advance() -> None:
                done = Counter(item.status for item in replay.outcomes)
                failed = len(replay.outcomes) - done[OutcomeStatus.COMPLETED]
                bar.update(task, completed=len(replay.outcomes), sent=replay.sent, failed=failed)

            replay = Replay(
                session, target, writer, max_concurrency=wanted.max_concurrency, progress=advance
            )
            # Ctrl-C: report what was done so far.
            with contextlib.suppress(asyncio.CancelledError):
                await replay.run(requests, speed=wanted.speed)
    return target.model, replay.outcomes


@contextlib.contextmanager
def _progress(total: int) -> Any:
    columns = (
        TextColumn("replaying"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[sent]} sent, {task.fields[failed]} not completed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console, disable=not sys.stderr.isatty()) as bar:
        yield bar, bar.add_task("", total=total, sent=0, failed=0)


def _by_class(outcomes: Sequence[Outcome], bounds: list[int] | None) -> list[dict[str, Any]]:
    """TTFT apart for each class of prompt length, since a mean over all hides who waits."""
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


def _show(report: dict[str, Any], summary: Summary) -> None:
    console = Console(highlight=False)
    verdict = (
        "[green]all complete[/]" if summary.completed == summary.sent else "[red]incomplete[/]"
    )
    console.print(
        f"{summary.sent} sent, {summary.completed} completed, {summary.failed} failed, "
        f"{summary.truncated} truncated: {verdict}"
    )
    console.print(
        f"{summary.duration_s:.1f} s, {summary.requests_per_s:.2f} requests/s, "
        f"{summary.output_tokens_per_s:.0f} output tokens/s, goodput {summary.goodput_rps:.2f} "
        f"requests/s, SLO attainment {summary.slo_attainment:.1%}"
    )
    table = Table("seconds", "p50", "p90", "p99")
    rows = [("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s)]
    rows += [("ITL", summary.itl_s), ("E2E", summary.e2e_s)]
    for name, values in rows:
        table.add_row(name, *_cells(values))
    console.print(table)
    apart = Table("prompt tokens", "requests", "TTFT p50", "p90", "p99", "longest wait")
    for row in report["classes"]:
        high = row["prompt_tokens_to"]
        span = f"{row['prompt_tokens_over'] + 1} to {high}" if high else "longer"
        values = Percentiles(**row["ttft_s"])
        wait = f"{row['longest_wait_s']:.3f}"
        apart.add_row(span, str(row["completed"]), *_cells(values), wait)
    console.print(apart)
    if summary.max_send_lag_s > 0.1:
        console.print(f"[yellow]this client lagged by up to {summary.max_send_lag_s:.2f} s[/]")
    for error, count in report["errors"].items():
        console.print(f"{count} x {error}", markup=False)


def _cells(values: Percentiles) -> tuple[str, str, str]:
    return f"{values.p50:.4f}", f"{values.p90:.4f}", f"{values.p99:.4f}"
