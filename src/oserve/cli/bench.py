"""``oserve bench``: replay a trace against any OpenAI-compatible server and report the results."""

import asyncio
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from oserve.cli.bench_report import document, per_request, show
from oserve.cli.load import Replay, new_session
from oserve.cli.options import (
    DurationOption,
    JsonOption,
    LimitOption,
    RateScaleOption,
    SkipBadRowsOption,
    SortOption,
    TierOption,
    TimeUnitOption,
    TpotOption,
    TraceArgument,
    TraceOption,
    TraceSelection,
    TtftOption,
    UrlOption,
    argument_or_option,
    check_over_zero,
    read_requests,
    slo_from,
    url_from,
)
from oserve.cli.plot import draw
from oserve.cli.prompts import PromptWriter
from oserve.cli.target import BenchTarget, calibrated_writer, find_target, warmed_up
from oserve.config import API_KEYS, environment_value
from oserve.config.reading import read_text
from oserve.config.tiers import parse_tiers
from oserve.core import OServeError
from oserve.traces import (
    Outcome,
    OutcomeStatus,
    TimeUnit,
    TraceRequest,
    fit_lengths,
    summarise,
    synthesise,
)

_console = Console(stderr=True, highlight=False, soft_wrap=True)

_MOST_SYNTHETIC = 5_000_000


@dataclass(frozen=True, kw_only=True)
class _BenchOptions:
    url: str
    model: str
    rate_scale: float
    chat: bool
    max_model_len: int | None
    prompt_scale: float | None
    output_scale: float | None
    api_key: str
    seed: int
    max_concurrency: int
    timeout_s: float
    warmup: int
    tenant_keys: dict[str, str]


def bench(
    trace_argument: TraceArgument = None,
    trace: TraceOption = None,
    synthetic: Annotated[
        str | None,
        typer.Option(help="Synthetic mixed traffic instead of a trace: RATE:SECONDS."),
    ] = None,
    url: UrlOption = None,
    model: Annotated[str, typer.Option(help="Model; the server's first by default.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")] = False,
    rate_scale: RateScaleOption = 1.0,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Context to scale lengths to; the server's by default."),
    ] = None,
    prompt_scale: Annotated[
        float | None, typer.Option(help="Factor on prompt lengths; fitted by default.")
    ] = None,
    output_scale: Annotated[
        float | None, typer.Option(help="Factor on output lengths; fitted by default.")
    ] = None,
    warmup: Annotated[
        int,
        typer.Option(
            min=0, help="Uncounted requests before the run; they detect the server's API dialect."
        ),
    ] = 1,
    max_concurrency: Annotated[
        int, typer.Option(min=1, help="Limit of requests in flight.")
    ] = 4096,
    timeout_s: Annotated[float, typer.Option(help="Timeout of a request in seconds.")] = 600.0,
    slo_ttft_ms: TtftOption = None,
    slo_tpot_ms: TpotOption = None,
    slo_e2e_ms: Annotated[float | None, typer.Option(help="SLO: limit of E2E latency.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Bounds of prompt lengths to report by, such as 512,2048.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"API key; OPENAI_API_KEY or the first of {API_KEYS} by default."),
    ] = None,
    tier: TierOption = None,
    tenant_keys: Annotated[
        Path | None,
        typer.Option(help="File with a line TENANT=KEY for each tenant that the trace names."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and synthetic traffic.")] = 0,
    as_json: JsonOption = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the report with a row per request (JSON).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the run (PNG, SVG or PDF).")] = None,
) -> None:
    """Replay a trace against a server in open loop, and check every answer.

    Exit code 0: all completed; 1: a request failed or was truncated; 2: bad input, or no server.
    """
    check_over_zero(
        rate_scale=rate_scale,
        timeout_s=timeout_s,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
    )
    slo = slo_from(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms)
    bounds = _bounds(classes)
    wanted = _BenchOptions(
        url=url_from(url),
        model=model,
        rate_scale=rate_scale,
        chat=chat,
        max_model_len=max_model_len,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
        api_key=api_key or _own_key(),
        seed=seed,
        max_concurrency=max_concurrency,
        timeout_s=timeout_s,
        warmup=warmup,
        tenant_keys=_tenant_keys(tenant_keys),
    )
    tiers = parse_tiers(tier or ())
    wish = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    trace = argument_or_option(trace_argument, trace, name="--trace")
    requests = _requests(trace, synthetic, wish, seed=seed)
    target, outcomes = uvloop.run(_replay(requests, wanted))
    summary = summarise(outcomes, slo)
    report = document(
        outcomes,
        summary,
        bounds,
        trace=trace or f"synthetic {synthetic}",
        target=target,
        rate_scale=rate_scale,
        limit=limit,
        tiers=tiers,
    )
    if output is not None:
        _write(output, {**report, "requests": per_request(outcomes)})
    if plot is not None:
        title = f"{report['trace']} at rate scale {rate_scale:g} on {target.model}: "
        draw(outcomes, slo, plot, title=f"{title}{summary.completed} of {summary.sent} completed")
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        show(report, summary)
    for path in (output, plot):
        if path is not None:
            _console.print(f"written: {path}", markup=False)
    if summary.completed < len(requests):
        raise typer.Exit(1)


def _own_key() -> str:
    return environment_value("OPENAI_API_KEY") or environment_value(API_KEYS).partition(",")[0]


def _tenant_keys(path: Path | None) -> dict[str, str]:
    """The keys by tenant of a file; raises OServeError naming the first bad line."""
    keys: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines() if path else (), start=1):
        tenant, equals, key = line.strip().partition("=")
        if line.strip() and not (equals and tenant and key):
            raise OServeError(
                "this is no tenant with its key", place=f"{path}:{number}", remedy="TENANT=KEY"
            )
        if line.strip():
            keys[tenant] = key
    return keys


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="check the path"
        ) from None


def _requests(
    trace: str | None, synthetic: str | None, wish: TraceSelection, *, seed: int
) -> list[TraceRequest]:
    if trace is not None and synthetic is None:
        return read_requests(trace, wish)
    if synthetic is None or trace is not None:
        raise OServeError(
            "the traffic is a trace or --synthetic, and exactly one of them",
            place="bench",
            remedy="for example oserve bench --synthetic 2:60",
        )
    rate, _, seconds = synthetic.partition(":")
    try:
        if float(rate) * float(seconds) > _MOST_SYNTHETIC and wish.limit is None:
            raise OServeError(
                f"it makes over {_MOST_SYNTHETIC:,} requests",
                place="--synthetic",
                remedy="give fewer, or --limit",
            )
        made = synthesise(rate_rps=float(rate), duration_s=float(seconds), seed=seed)
        requests = list(itertools.islice(made, wish.limit))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise OServeError(
            f"{synthetic!r} is not RATE:SECONDS",
            place="--synthetic",
            remedy="for example 2:60 for two requests a second, for a minute",
        ) from None
    if not requests:
        raise OServeError(
            "there is no request to send", place="--synthetic", remedy="give a higher rate or more"
        )
    return requests


def _bounds(classes: str | None) -> list[int] | None:
    """The given bounds; None for the terciles of the replayed prompts."""
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


async def _replay(
    requests: list[TraceRequest], wanted: _BenchOptions
) -> tuple[BenchTarget, list[Outcome]]:
    async with new_session() as session:
        target = await find_target(
            session,
            wanted.url,
            model=wanted.model,
            api_key=wanted.api_key,
            chat=wanted.chat,
            timeout_s=wanted.timeout_s,
        )
        target = replace(target, tenant_keys=wanted.tenant_keys)
        context = wanted.max_model_len or target.max_model_len
        if context:
            requests = fit_lengths(
                requests,
                max_model_len=context,
                prompt_scale=wanted.prompt_scale,
                output_scale=wanted.output_scale,
                # Prompts are made of words, so their token counts are approximate.
                reserve_tokens=max(32, context // 50),
            )
        writer = await calibrated_writer(session, target, seed=wanted.seed)
        for number in range(wanted.warmup):
            target, length = await warmed_up(session, target, seed=wanted.seed + number)
            if length is not None and not writer.calibrated:
                writer = PromptWriter.measured([length], seed=wanted.seed)
        for note in target.dialect.notes:
            _console.print(f"note: {target.url}: {note}", markup=False)
        with _progress(len(requests)) as (bar, task):

            def advance() -> None:
                done = Counter(item.status for item in replay.outcomes)
                failed = len(replay.outcomes) - done[OutcomeStatus.COMPLETED]
                bar.update(task, completed=len(replay.outcomes), sent=replay.sent, failed=failed)

            replay = Replay(
                session, target, writer, max_concurrency=wanted.max_concurrency, progress=advance
            )
            # On Ctrl-C, report the finished requests.
            with contextlib.suppress(asyncio.CancelledError):
                await replay.run(requests, speed=wanted.rate_scale)
    return target, replay.outcomes


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("replaying"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[sent]} sent, {task.fields[failed]} not completed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console, disable=not sys.stderr.isatty()) as bar:
        yield bar, bar.add_task("", total=total, sent=0, failed=0)
