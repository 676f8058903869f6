"""``oserve serve``: run a deployment."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from oserve.app.running import serve_until_stopped
from oserve.app.server import OServeServer
from oserve.cli.engines import notes as engine_notes
from oserve.cli.measuring import reporting
from oserve.cli.options import (
    ConfigOption,
    CpuSlotsOption,
    ModelArgument,
    ModelOption,
    OverrideOption,
    argument_or_option,
)
from oserve.config import Settings, environment_value, load_settings, parse_override
from oserve.core import AttachedBackend, OServeError
from oserve.gateway.process.collection import rare_collections
from oserve.profiler.brief import LIMIT_S, measure_briefly, shapes_to_measure
from oserve.startup.deployment import ServerDeployment, prepare
from oserve.startup.lock import serves_already
from oserve.startup.node_fleet import NodeFleet, foreseen, node_fleet

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def settings_from(
    config: str | None, options: dict[str, Any], overrides: list[str] | None
) -> Settings:
    """Settings from a file, the environment, named options and ``--set``, in that order."""
    merged = {path: value for path, value in options.items() if value is not None}
    merged.update(parse_override(item) for item in overrides or [])
    return load_settings(config or environment_value("OSERVE_CONFIG") or None, merged)


def serve(
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    plan: Annotated[
        str | None, typer.Option(help="Deployment plan (YAML): replicas, types, shares.")
    ] = None,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name clients use for the model.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Serve on several machines: ray, ray:HOST:PORT, or a file with hosts."),
    ] = None,
    cpu_slots: CpuSlotsOption = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Folder for logs and request records.")
    ] = None,
    override: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, start nothing.")
    ] = False,
) -> None:
    """Start replicas as planned and serve them behind one OpenAI-compatible endpoint."""
    options = {
        "model": argument_or_option(model_argument, model, name="--model"),
        "plan": plan,
        "gateway.host": host,
        "gateway.port": port,
        "served_model_name": served_model_name,
        "cluster.nodes": cluster,
        "cluster.cpu_slots": cpu_slots,
        "state_dir": state_dir,
    }
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = settings_from(config, options, override)
    if settings.cluster.nodes and dry_run:
        _show(prepare(settings, asyncio.run(foreseen(settings))))
        return
    fleet = node_fleet(settings)
    if fleet is not None:
        raise typer.Exit(uvloop.run(_serve_nodes(settings, fleet)))
    measure_first(settings, dry_run=dry_run)
    deployment = prepare(settings)
    _show(deployment)
    if not dry_run:
        rare_collections()
        raise typer.Exit(uvloop.run(_serve(deployment)))


async def _serve_nodes(settings: Settings, fleet: NodeFleet) -> int:
    """Serve on other machines; they are found first, since a plan depends on them."""
    begun = False
    try:
        await fleet.start()
        deployment = await asyncio.to_thread(prepare, settings, fleet.found(settings))
        _show(deployment)
        rare_collections()
        server = _server(deployment, fleet)
        begun = True
        return await _serve(deployment, server)
    finally:
        if not begun:
            await fleet.close(end_nodes=not serves_already(Path(settings.state_dir)))


def measure_first(settings: Settings, *, dry_run: bool) -> None:
    """Measure briefly if no performance data exists; with ``dry_run`` only announce it."""
    shapes = shapes_to_measure(settings)
    if not shapes:
        return
    names = ", ".join(shape.name for shape in shapes)
    if dry_run:
        _console.print(f"note: serving would first measure for at most a minute: {names}")
        return
    _console.print(
        f"The speed of {settings.model} on this CPU is unknown. "
        f"Measuring once, for at most {LIMIT_S:.0f} s (disable it with planning.measure=never)"
    )
    with reporting(_console) as report:
        file = uvloop.run(measure_briefly(settings, shapes, report=report))
    if file is None:
        _console.print("no measurement finished in that time")
    else:
        _console.print(f"written: {file}; oserve profile {settings.model} measures more precisely")


def _server(deployment: ServerDeployment, fleet: NodeFleet | None = None) -> OServeServer:
    return OServeServer(
        deployment, fleet=fleet, changed=lambda line: _console.print(f"replicas: {line}")
    )


async def _serve(deployment: ServerDeployment, server: OServeServer | None = None) -> int:
    server = server or _server(deployment)

    def announce(port: int) -> None:
        _announce(deployment, port, server.failed)

    status = await serve_until_stopped(server, announce=announce)
    _console.print("stopped: all replica processes have exited")
    await asyncio.sleep(0)
    return status


def _show(deployment: ServerDeployment) -> None:
    plan = deployment.plan
    _console.print(f"Serving [bold]{deployment.models[0]}[/] with {deployment.why}")
    for note in (*deployment.notes, *engine_notes()):
        _console.print(f"note: {note}", markup=False)
    table = Table("replica", "shape", "seqs", "devices", "serves")
    for spec in plan.replicas:
        shares = [
            f"{kind} {share[spec.id]:.0%}"
            for kind, share in plan.routing_shares.items()
            if share.get(spec.id)
        ]
        backend = spec.backend
        attached = isinstance(backend, AttachedBackend)
        devices = backend.url if isinstance(backend, AttachedBackend) else ", ".join(spec.devices)
        table.add_row(
            spec.id,
            "attached" if attached else spec.shape.name,
            "" if attached else str(spec.shape.max_num_seqs),
            devices,
            ", ".join(shares) or "overflow only",
        )
    _console.print(table)


def _announce(deployment: ServerDeployment, port: int, failed: dict[str, str]) -> None:
    settings = deployment.settings
    host = settings.gateway.host
    shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    scheme = "https" if settings.gateway.tls.certificate_file else "http"
    url = f"{scheme}://{shown}:{port}"
    if len(failed) == len(deployment.plan.replicas):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise OServeError(
            f"no replica of the plan could start. {reasons}",
            place="engines",
            remedy=f"read the logs in {settings.engines.log_dir}",
        )
    for name, reason in failed.items():
        _console.print(f"[yellow]replica {name} could not start:[/] {reason}")
    body = {
        "model": deployment.models[0],
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 48,
    }
    _console.print(f"\nReady on [bold]{url}[/]  (status: oserve status --url {url})")
    _console.print("Try:\n")
    line = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
    _console.print(line + f"-d '{json.dumps(body)}'\n", markup=False)
