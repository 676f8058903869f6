"""``oserve node``: the nodes of a running server, and what an operator wants of them; see also
``node_serve``."""

import json
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from oserve.cli.node_serve import serve_node
from oserve.cli.options import ApiKeyOption, JsonOption, UrlOption, url_from
from oserve.cli.remote import call, decode
from oserve.core import OServeError

app = typer.Typer(
    help="Show the nodes of a running server; cordon, drain and uncordon them.",
    no_args_is_help=True,
)

app.command("serve")(serve_node)

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_PATH = "/oserve/v1/nodes"
_POLL_S = 1.0
_SHOWN = 4

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="A name from oserve node list.")]


@app.command("list")
def list_nodes(
    url: UrlOption = None, as_json: JsonOption = False, api_key: ApiKeyOption = None
) -> None:
    """Show each node, its state, and the replicas on it."""
    nodes = _called(url_from(url), "list", api_key=api_key)
    if as_json:
        print(json.dumps(nodes, indent=2))
    elif not nodes:
        _console.print("this server runs on one machine: there are no nodes")
    else:
        Console(highlight=False).print(node_table(nodes))


@app.command()
def cordon(node: NodeArgument, url: UrlOption = None, api_key: ApiKeyOption = None) -> None:
    """Start nothing new on a node; what runs there goes on."""
    _told(url_from(url), "cordon", node, api_key)


@app.command()
def uncordon(node: NodeArgument, url: UrlOption = None, api_key: ApiKeyOption = None) -> None:
    """Use a node again; this also ends a hold-down."""
    _told(url_from(url), "uncordon", node, api_key)


@app.command()
def drain(
    node: NodeArgument,
    url: UrlOption = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until no replica is left on the node.")
    ] = True,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="Wait at most this long.")
    ] = 1800.0,
    api_key: ApiKeyOption = None,
) -> None:
    """Empty a node: other replicas replace those on it, and running streams move.

    It stays empty until oserve node uncordon. Exit code 2 if it is not empty in time.
    """
    base = url_from(url)
    found = _told(base, "drain", node, api_key)
    until_s = time.monotonic() + timeout_s
    shown = -1
    while wait and found["replicas"]:
        if len(found["replicas"]) != shown:
            shown = len(found["replicas"])
            _console.print(f"left on it: {', '.join(found['replicas'])}", markup=False)
        if time.monotonic() >= until_s:
            raise OServeError(
                f"{len(found['replicas'])} replicas are still on it after {timeout_s:g} s",
                place=f"node {node}",
                remedy="see oserve status; the node goes on draining",
            )
        time.sleep(_POLL_S)
        found = _one(_called(base, "list", api_key=api_key), node)
    if not found["replicas"]:
        _console.print(f"node {node} is empty")


def node_table(nodes: list[dict[str, Any]]) -> Table:
    """The table of nodes that ``oserve node list`` and ``oserve status`` show."""
    table = Table("node", "state", "devices", "replicas", "links", "note")
    for item in nodes:
        table.add_row(
            item["name"],
            f"{item['state'].replace('_', ' ')} {item['state_s']:.0f} s",
            str(item["devices"]),
            ", ".join(item["replicas"]) or "-",
            _links(item.get("links", {})),
            _note(item),
        )
    return table


def _links(links: dict[str, Any]) -> str:
    """The medians over the links that were measured."""
    if not links.get("measured"):
        return "-"
    return f"{1e3 * links['round_trip_s']:.2f} ms, {links['bytes_per_s'] / 1e6:,.0f} MB/s"


def _note(item: dict[str, Any]) -> str:
    notes = []
    if item["reason"] and item["state"] in {"lost", "fetching"}:
        notes.append(item["reason"])
    if item["state"] == "silent":
        notes.append(f"no sign of life for {item['silent_s']:.0f} s")
    if item["held_down_s"]:
        notes.append(f"not in use for another {item['held_down_s']:.0f} s")
    if item["word"] and item["word"] != item["state"]:
        notes.append(item["word"])
    if failed := item.get("links", {}).get("failed"):
        notes.append(f"no link to {', '.join(failed[:_SHOWN])}")
    if item["losses"]:
        notes.append(f"lost {item['losses']} time(s)")
    return "; ".join(notes)


def _told(url: str, action: str, node: str, api_key: str | None) -> dict[str, Any]:
    found = _one(_called(url, action, node, api_key=api_key), node)
    _console.print(f"node {node}: {found['word'] or found['state'].replace('_', ' ')}")
    return found


def _called(url: str, action: str, node: str = "", *, api_key: str | None) -> list[dict[str, Any]]:
    body = msgspec.json.encode({"action": action, "node": node})
    raw = call(url, _PATH, api_key=api_key, body=body)
    nodes: list[dict[str, Any]] = decode(raw, url, needed="nodes")["nodes"]
    return nodes


def _one(nodes: list[dict[str, Any]], name: str) -> dict[str, Any]:
    for item in nodes:
        if item["name"] == name:
            return item
    raise OServeError(
        "the server does not know it any more", place=f"node {name}", remedy="see oserve node list"
    )
