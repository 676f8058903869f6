"""``oserve switch`` and ``oserve plan --live``: manual control of a running server's plan."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oserve.cli.options import ApiKeyOption, JsonOption, UrlOption, argument_or_option, url_from
from oserve.cli.remote import call, decode
from oserve.config.reading import read_text
from oserve.core import OServeError
from oserve.switch.preview import between_nodes_line

_console = Console(stderr=True, highlight=False, soft_wrap=True)
# Planning for a large cluster takes seconds.
_TIMEOUT_S = 120.0


def switch(
    plan: Annotated[str | None, typer.Argument(help="Deployment plan (YAML) to switch to.")] = None,
    to: Annotated[
        str | None, typer.Option("--to", "--plan", help="The plan, as an option.")
    ] = None,
    url: UrlOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the benefit and the cost.")
    ] = False,
    as_json: JsonOption = False,
    api_key: ApiKeyOption = None,
) -> None:
    """Switch a running server to a plan; where possible, weights move between engines.

    Running requests complete on their replicas. --dry-run shows bytes per link and the duration of
    each phase.
    """
    plan = argument_or_option(plan, to, name="--to")
    if plan is None:
        raise OServeError("there is no plan", place="--to", remedy="name a plan file")
    url = url_from(url)
    path = "/oserve/v1/plan" if dry_run else "/oserve/v1/switch"
    text = read_text(Path(plan)).encode()
    if not text.strip():
        raise OServeError("it is empty", place=plan, remedy="give a plan")
    raw = call(url, path, api_key=api_key, body=text, timeout_s=_TIMEOUT_S)
    document = decode(raw, url, needed="line")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    _console.print(document["line"], markup=False)
    if "foreseen" in document:
        for line in describe_switch(document["foreseen"]):
            _console.print(line, markup=False)
    elif document.get("switch"):
        _console.print(f"switch {document['switch']}: follow it with oserve status", markup=False)


def describe_switch(document: dict[str, Any]) -> list[str]:
    """Lines that describe the planned switch."""
    if document["method"] == "restart":
        return [f"by restarts: {document['reason']}"]
    lines = [
        f"weights move between engines: ready after {document['ready_s']:g} s, done after "
        f"{document['total_s']:g} s; {document['requests_running_on_leaving']} requests run on "
        "replicas that leave",
    ]
    if document["reason"]:
        lines.append(document["reason"])
    for number, wave in enumerate(document["waves"]):
        parts = [
            f"{what} {', '.join(wave[what])}" for what in ("stop", "start", "retire") if wave[what]
        ]
        lines.append(f"wave {number}: {'; '.join(parts)}")
        lines.append(
            f"  {wave['moved_bytes']:,} bytes over links, {wave['local_bytes']:,} inside devices"
        )
        lines += [
            f"    {link['source']} -> {link['target']}: {link['bytes']:,} bytes"
            for link in wave["links"]
        ]
        phases = ", ".join(f"{name} {took:g}" for name, took in wave["phases_s"].items())
        lines.append(f"  seconds: {phases}")
    if between := between_nodes_line(document):
        lines.append(f"between nodes: {between}")
    return lines


def live_plan(url: str, *, api_key: str | None, as_json: bool, output: str | None) -> None:
    """Show the plan that a running server would switch to now, and why."""
    raw = call(url, "/oserve/v1/plan", api_key=api_key, body=b"", timeout_s=_TIMEOUT_S)
    document = decode(raw, url, needed="line")
    if output:
        try:
            Path(output).write_text(document["plan"], encoding="utf-8")
        except OSError as error:
            raise OServeError(
                f"cannot write it: {error.strerror}", place=output, remedy="check the path"
            ) from None
        _console.print(f"written: {output}")
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        print(document["line"])
        print(document["plan"], end="")
