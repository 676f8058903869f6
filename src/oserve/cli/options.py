"""Options that several commands share, each with one name, one meaning and one default."""

import math
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from oserve.config import API_KEYS, environment_value
from oserve.core import OServeError
from oserve.core.url import server_url
from oserve.traces import BadRows, Skipped, Slo, TimeUnit, TraceRequest, read_trace

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_DEFAULT_URL = "http://127.0.0.1:8000"

TraceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TRACE",
        show_default=False,
        help="Trace: CSV or JSONL (canonical, Azure, BurstGPT, Mooncake, Bailian, Vidur, or a time "
        "and two lengths under usual names), gzipped or not, or OServe's request records.",
    ),
]
TraceOption = Annotated[str | None, typer.Option("--trace", help="The trace, as an option.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Model folder or Hugging Face id, as for vllm serve.",
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model, as an option.")]
TimeUnitOption = Annotated[
    TimeUnit,
    typer.Option(
        "--time-unit", help="Unit of the trace's timestamps; inferred from the file by default."
    ),
]
SkipBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Count and skip bad rows of the trace.")
]
SortOption = Annotated[bool, typer.Option("--sort", help="Sort the trace's rows by arrival.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="Use only this many requests of the trace.")
]
DurationOption = Annotated[
    float | None,
    typer.Option("--duration-s", "--duration", help="Use only this many seconds of the trace."),
]
RateScaleOption = Annotated[
    float,
    typer.Option("--rate-scale", "--speed", help="Factor on the arrival rates."),
]
TierOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Service tier: NAME=TTFT_MS/TPOT_MS\\[/PRECISION+...] ('-': no limit); may be "
        "repeated. The first is the default."
    ),
]
TtftOption = Annotated[
    float | None, typer.Option("--slo-ttft-ms", help="SLO: limit of the time to first token.")
]
TpotOption = Annotated[
    float | None, typer.Option("--slo-tpot-ms", help="SLO: limit of the time per output token.")
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option("--max-model-len", min=2, help="Context in tokens; the model's own by default."),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", help="Settings file (YAML); or OSERVE_CONFIG. See docs/configuration.md."
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Any setting; may be repeated."),
]
CpuSlotsOption = Annotated[
    int | None, typer.Option("--cpu-slots", help="Split the CPU cores into this many devices.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help=f"The server, as URL or host:port; OSERVE_URL or {_DEFAULT_URL} by default."
    ),
]
ApiKeyOption = Annotated[
    str | None, typer.Option("--api-key", help=f"API key; the first of {API_KEYS} by default.")
]


def url_from(text: str | None) -> str:
    """The server's base URL: the option, else ``OSERVE_URL``, else the default."""
    if text is not None:
        return server_url(text)
    own = environment_value("OSERVE_URL")
    return server_url(own, place="OSERVE_URL") if own else _DEFAULT_URL


def argument_or_option(argument: str | None, option: str | None, *, name: str) -> str | None:
    """The value of an argument or of the option ``name``. Raises OServeError if both are given."""
    if argument is not None and option is not None:
        raise OServeError(
            f"it is given twice: {argument!r} and {option!r}",
            place=name,
            remedy=f"give it once, as an argument or as {name}",
        )
    return option if argument is None else argument


def check_over_zero(**values: float | None) -> None:
    """Raise OServeError for an option that is not a finite number over 0."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OServeError(
                f"it is {value:g}",
                place=f"--{name.replace('_', '-')}",
                remedy="give a number over 0",
            )


def slo_from(ttft_ms: float | None, tpot_ms: float | None, e2e_ms: float | None = None) -> Slo:
    """The SLO of the options, which are in milliseconds. Raises OServeError."""
    check_over_zero(slo_ttft_ms=ttft_ms, slo_tpot_ms=tpot_ms, slo_e2e_ms=e2e_ms)
    return Slo(
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
        e2e_s=None if e2e_ms is None else e2e_ms / 1e3,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSelection:
    """The part of a trace to read, and how to read it."""

    limit: int | None = None
    duration_s: float | None = None
    time_unit: TimeUnit = TimeUnit.AUTO
    skip_bad_rows: bool = False
    sort: bool = False

    def __post_init__(self) -> None:
        check_over_zero(limit=self.limit, duration_s=self.duration_s)

    @property
    def bad_rows(self) -> BadRows:
        """How the reader handles bad rows."""
        return BadRows.SKIP if self.skip_bad_rows else BadRows.REFUSE


def read_requests(path: str, wish: TraceSelection) -> list[TraceRequest]:
    """The requests of a trace, at least one; reports assumptions and skips on standard error."""
    skipped = Skipped()
    found = list(
        read_trace(
            path,
            limit=wish.limit,
            until_s=wish.duration_s,
            bad_rows=wish.bad_rows,
            time_unit=wish.time_unit,
            sort=wish.sort,
            skipped=skipped,
        )
    )
    report_reading(path, skipped)
    if not found:
        raise OServeError(
            "zero traffic: the trace has no requests", place=path, remedy="give one that has"
        )
    return found


def report_reading(path: str, skipped: Skipped) -> None:
    """Report what the reader assumed or skipped."""
    if skipped.assumed:
        _console.print(f"note: {path}: {skipped.assumed}; override with --time-unit", markup=False)
    if skipped.count:
        _console.print(
            f"note: skipped {skipped.count} bad rows of {path}; {'; '.join(skipped.first)}",
            markup=False,
        )
