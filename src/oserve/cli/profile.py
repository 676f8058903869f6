"""``oserve profile``: measure engines for planning."""

import re
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from oserve.cli.measuring import reporting
from oserve.cli.options import (
    ConfigOption,
    CpuSlotsOption,
    ModelArgument,
    ModelOption,
    OverrideOption,
    argument_or_option,
)
from oserve.cli.serve import settings_from
from oserve.config import environment_value
from oserve.core import Device, Endpoint, OServeError, Precision, ReplicaShape
from oserve.core.url import server_url
from oserve.perf.known_models import find_model
from oserve.perf.profile import (
    Profile,
    ProfileEntry,
    key_name,
    merged,
    read_profile,
    write_profile,
)
from oserve.profiler.profile import (
    default_shapes,
    limited,
    profile_devices,
    profile_running,
    profile_started,
)

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_SHAPE = re.compile(
    r"^(?=tp|pp)(?:tp(?P<tp>\d+))?(?:pp(?P<pp>\d+))?-(?P<precision>[a-z]+\d+)"
    r"(?:-(?P<chunk>\d+))?(?:-(?P<seqs>\d+))?$"
)
_SHOWN_SEQS = (1, 16, 32)


def profile(
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="TPPP-PRECISION[-CHUNK[-SEQS]], such as tp2pp1-fp32; may be repeated."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Measure this running vLLM engine of one --shape; start nothing."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Profile file; profile.json in the state folder by default.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="Measurements of each step, for the median.")
    ] = 3,
    cpu_slots: CpuSlotsOption = None,
    config: ConfigOption = None,
    api_key: Annotated[
        str | None, typer.Option(help="API key for --url; OPENAI_API_KEY by default.")
    ] = None,
    override: OverrideOption = None,
) -> None:
    """Measure engine steps, fit a performance model to them, and write both to a file.

    Without --shape it measures every available precision (fp32 or bf16, and engines.variants) on
    one device and on two. With --url the shape's limits must be those of the running engine.
    """
    model = argument_or_option(model_argument, model, name="--model")
    if model is None:
        raise OServeError("no model is named", place="--model", remedy="name a model")
    server = None if url is None else server_url(url)
    settings = settings_from(config, {"model": model, "cluster.cpu_slots": cpu_slots}, override)
    devices = profile_devices(settings)
    facts = find_model(model)
    shapes = tuple(_shape(text, devices) for text in shape or []) or (
        default_shapes(settings, devices, facts)
    )
    path = output or Path(settings.state_dir) / "profile.json"
    before = read_profile(path) if path.exists() else None
    with reporting(_console) as report:
        if server is None:
            made = uvloop.run(
                profile_started(settings, devices, shapes, rounds=rounds, report=report)
            )
        else:
            if not shape or len(shape) != 1:
                raise OServeError(
                    "the shape of the running engine is unknown",
                    place="--url",
                    remedy="give it as one --shape, such as tp1pp1-bf16-2048-128",
                )
            key = api_key or environment_value("OPENAI_API_KEY")
            endpoint = Endpoint(url=server, api_key=key)
            made = uvloop.run(
                profile_running(endpoint, facts, devices, shapes[0], rounds=rounds, report=report)
            )
    _show(made)
    write_profile(path, made if before is None else merged(before, made))
    _console.print(f"written to {path}")


def _shape(text: str, devices: tuple[Device, ...]) -> ReplicaShape:
    """Parse a shape. Raises OServeError."""
    found = _SHAPE.match(text)
    if found is None or found["precision"] not in set(Precision):
        raise OServeError(
            f"{text!r} is not a shape",
            place="--shape",
            remedy="write it as tp2pp1-fp32, or tp1-int8-512-16 with chunk budget and sequences",
        )
    sizes = [int(found[name] or 1) for name in ("tp", "pp")]
    limits = [int(found[name]) if found[name] else None for name in ("chunk", "seqs")]
    if 0 in (*sizes, *limits):
        raise OServeError(f"a zero in {text!r}", place="--shape", remedy="use at least 1")
    plain = ReplicaShape(
        tensor_parallel_size=sizes[0],
        pipeline_parallel_size=sizes[1],
        precision=Precision(found["precision"]),
    )
    return limited(plain, cpu=devices[0].kind == "cpu", chunk=limits[0], seqs=limits[1])


def _show(made: Profile) -> None:
    table = Table(title=made.machine)
    table.add_column("shape", no_wrap=True)
    table.add_column("KV tokens", justify="right")
    table.add_column("prefill tokens/s", justify="right")
    for count in _SHOWN_SEQS:
        table.add_column(f"decode tokens/s, {count} seqs", justify="right")
    table.add_column("fit error", justify="right")
    for entry in made.entries:
        table.add_row(
            key_name(entry.key),
            f"{entry.kv_tokens:,}",
            f"{_prefill_rate(entry):,.0f}",
            *(_decode_rate(entry, count) for count in _SHOWN_SEQS),
            f"{entry.error_percent:.1f} %",
        )
    Console().print(table)


def _prefill_rate(entry: ProfileEntry) -> float:
    """The prefill rate of the longest prompt measured alone."""
    alone = [step for step in entry.steps if step.prefill_tokens and not step.decode_seqs]
    longest = max(alone, key=lambda step: step.prefill_tokens)
    return longest.prefill_tokens / longest.seconds


def _decode_rate(entry: ProfileEntry, seqs: int) -> str:
    """The decode rate with short contexts, over all micro-batches of a pipeline."""
    stages = min(entry.pipeline_parallel_size, seqs)
    found = [
        step
        for step in entry.steps
        if not step.prefill_tokens and step.decode_seqs * stages == seqs
    ]
    if not found:
        return "-"
    return f"{seqs / min(found, key=lambda step: step.kv_tokens).seconds:,.0f}"
