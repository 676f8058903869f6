"""``oserve validate``: is this configuration sound?"""

import asyncio
from typing import Annotated

import typer

from oserve.app.attached import ask_attached, refuse_troubled
from oserve.app.deployment import prepare
from oserve.cli.serve import settings_from
from oserve.config import backend_keys


def validate(
    config: Annotated[
        str | None, typer.Option(help="Settings file (YAML); see docs/configuration.md.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Deployment plan (YAML).")] = None,
    model: Annotated[str | None, typer.Option(help="Model, if the settings name none.")] = None,
    cpu_slots: Annotated[
        int | None, typer.Option(help="Cut the CPU cores into this many devices.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, as path=value; may be repeated."),
    ] = None,
    ask: Annotated[
        bool, typer.Option(help="Ask attached servers whether they can serve: one token each.")
    ] = True,
) -> None:
    """Check settings and plan against this machine's devices, and ask attached servers.

    Starts nothing.
    """
    options = {"plan": plan, "model": model, "cluster.cpu_slots": cpu_slots}
    deployment = prepare(settings_from(config, options, override))
    if ask:
        variables = backend_keys(deployment.plan)
        asked = asyncio.run(ask_attached(deployment.plan, variables, model=deployment.models[0]))
        for item in asked:
            print(item.line)
        refuse_troubled(asked, place=deployment.settings.plan or "plan")
    replicas = len(deployment.plan.replicas)
    print(
        f"ok: {replicas} replicas on {len(deployment.devices)} devices "
        f"({deployment.devices[0].kind}), {deployment.why}"
    )
