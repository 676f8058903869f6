"""``oserve switch`` and ``oserve plan --live``: a running server's plan, by a person."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oserve.cli.remote import call, decode
from oserve.config import API_KEYS
from oserve.config.reading import read_text
from oserve.core import OServeError

_console = Console(stderr=True, highlight=False, soft_wrap=True)
# Planning for a large cluster takes seconds.
_TIMEOUT_S = 120.0


def switch(
    plan: Annotated[str, typer.Argument(help="Deployment plan (YAML) to switch to.")],
    url: Annotated[str, typer.Option(help="The server's base URL.")] = "http://127.0.0.1:8000",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would bring and cost.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(help=f"API key; the first of {API_KEYS} by default.")
    ] = None,
) -> None:
    """Have a running server switch to a plan: it is rolled out, and no request is broken off."""
    path = "/oserve/v1/plan" if dry_run else "/oserve/v1/switch"
    text = read_text(Path(plan)).encode()
    if not text.strip():
        raise OServeError("it is empty", place=plan, remedy="give a plan")
    raw = call(url, path, api_key=api_key, body=text, timeout_s=_TIMEOUT_S)
    _console.print(decode(raw, url)["line"], markup=False)


def live_plan(url: str, *, api_key: str | None, as_json: bool, output: str | None) -> None:
    """Ask a running server what it would switch to now, and why."""
    raw = call(url, "/oserve/v1/plan", api_key=api_key, body=b"", timeout_s=_TIMEOUT_S)
    document = decode(raw, url)
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
