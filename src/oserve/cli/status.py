"""``oserve status``: what a running server does."""

import asyncio
from typing import Annotated, Any

import aiohttp
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from oserve.config import API_KEYS, environment_value
from oserve.core import OServeError

_TIMEOUT_S = 10.0


def status(
    url: Annotated[str, typer.Option(help="The server's base URL.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the document itself.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help=f"API key; the first of {API_KEYS} by default.")
    ] = None,
) -> None:
    """Show replicas, shapes, phases, load and routing shares of a running server."""
    key = api_key or environment_value(API_KEYS).partition(",")[0]
    raw = asyncio.run(_fetch(url.rstrip("/") + "/oserve/v1/status", key))
    if as_json:
        print(raw.decode())
        return
    _show(_decode(raw, url))


async def _fetch(url: str, key: str) -> bytes:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, headers=headers) as answer,
        ):
            body = await answer.read()
            if answer.status == 401:
                raise OServeError(
                    "it wants an API key", place=url, remedy=f"set {API_KEYS} or --api-key"
                )
            if answer.status != 200:
                raise OServeError(
                    f"it answered with status {answer.status}",
                    place=url,
                    remedy="is this an OServe server?",
                )
            return body
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise OServeError(
            f"no answer: {error or 'timed out'}",
            place=url,
            remedy="start it with oserve serve, or give --url",
        ) from None


def _decode(raw: bytes, url: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.DecodeError:
        raise OServeError(
            "its status is not JSON", place=url, remedy="is this an OServe server?"
        ) from None


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False)
    serving = "[green]serving[/]" if document["serving"] else "[red]not serving[/]"
    console.print(f"{document['model']}: {serving}, plan [bold]{document['plan_id']}[/]")
    table = Table("replica", "shape", "devices", "phase", "running", "waiting", "KV", "note")
    for entry in document["replicas"]:
        shape = entry["shape"]
        sizes = f"TP{shape['tensor_parallel_size']} PP{shape['pipeline_parallel_size']}"
        table.add_row(
            entry["id"],
            f"{sizes} {shape['precision']} chunk {shape['max_num_batched_tokens']}",
            ", ".join(entry["devices"]) or "attached",
            f"{entry['phase']} {entry['phase_s']:.0f} s",
            str(entry["running"]),
            str(entry["waiting"]),
            f"{entry['kv_cache_usage']:.0%}",
            entry["note"] or entry["detail"],
        )
    console.print(table)
    names = [entry["id"] for entry in document["replicas"]]
    shares = Table("type", "prompt tokens", *names)
    for kind in document["workload_types"]:
        bound = kind["max_prompt_tokens"]
        given = document["routing_shares"].get(kind["name"], {})
        shares.add_row(
            kind["name"],
            f"up to {bound}" if bound else "any",
            *(f"{given.get(name, 0.0):.0%}" for name in names),
        )
    console.print(shares)
