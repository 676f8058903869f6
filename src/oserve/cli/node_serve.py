"""``oserve node serve``: set this machine up as a node of a cluster without Ray."""

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from oserve.cli.options import CpuSlotsOption
from oserve.core import OServeError
from oserve.nodes.agent import NodeAgent, token_file
from oserve.nodes.agent_messages import AgentOrders, NodeRefusal, NodeReport
from oserve.nodes.node_ledger import plain_name
from oserve.wire.hatch import fingerprint_of

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_TEND_S = 2.0
_EVERY_ADDRESS = {"", "0.0.0.0", "::"}


def serve_node(
    address: Annotated[
        str, typer.Option(help="Address of this machine where servers and other nodes reach it.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of its hatch.")] = 7443,
    name: Annotated[
        str | None, typer.Option(help="Name of the node; by default that of the machine.")
    ] = None,
    state_dir: Annotated[
        str, typer.Option(help="Folder for keys, logs and the keeper's registry.")
    ] = ".oserve/nodes",
    devices: Annotated[str, typer.Option(help="auto, gpu or cpu.")] = "auto",
    cpu_slots: CpuSlotsOption = None,
    grace_s: Annotated[
        float, typer.Option(min=0, help="How long engines are kept without a server.")
    ] = 60.0,
) -> None:
    """Offer this machine to servers elsewhere, until interrupted; then everything on it ends.

    Prints the lines that the cluster file of the server needs.
    """
    if address in _EVERY_ADDRESS:
        raise OServeError(
            "others cannot reach this address",
            place="--address",
            remedy="name one address of this machine, in the cluster's private network",
        )
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if devices not in {"auto", "gpu", "cpu"}:
        raise OServeError(
            f"{devices!r} is no kind", place="--devices", remedy="use auto, gpu or cpu"
        )
    orders = AgentOrders(
        node=plain_name(name or socket.gethostname()),
        host=address,
        port=port,
        state_dir=str(Path(state_dir).resolve()),
        devices=devices,
        cpu_slots=cpu_slots,
        grace_s=grace_s,
    )
    uvloop.run(_serve(orders))


async def _serve(orders: AgentOrders) -> None:
    agent = NodeAgent()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    first = await agent.set_up(orders)
    if isinstance(first, NodeRefusal):
        raise OServeError(first.reason, place=f"node {orders.node}", remedy=first.remedy)
    _show(orders, first)
    told = ""
    while not stopped.is_set():
        try:
            async with asyncio.timeout(_TEND_S):
                await stopped.wait()
        except TimeoutError:
            answer = await agent.set_up(orders)
            reason = answer.reason if isinstance(answer, NodeRefusal) else ""
            if reason and reason != told:
                _console.print(f"[red]the node is not up:[/] {reason}")
            told = reason
    await agent.tear_down(orders)
    _console.print("stopped: nothing of this node runs any more")


def _show(orders: AgentOrders, report: NodeReport) -> None:
    names = ", ".join(device.id for device in report.devices)
    _console.print(f"Node [bold]{orders.node}[/] is up with {names}. In the server's cluster file:")
    lines = (
        "hosts:",
        f"  - name: {orders.node}",
        f"    address: {orders.host}",
        f"    port: {report.hatch.port}",
        f"    token_file: {token_file(orders)}",
        f"    certificate_sha256: '{fingerprint_of(report.hatch.certificate)}'",
    )
    print("\n".join(lines), flush=True)
    _console.print("Copy the token file to the server's machine, readable for its user alone.")
