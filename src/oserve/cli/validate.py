"""``oserve validate``: is this configuration sound?"""

from typing import Annotated

import typer

from oserve.app.deployment import prepare
from oserve.cli.serve import measure_first, settings_from


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
) -> None:
    """Check settings and plan against this machine's devices; start nothing."""
    options = {"plan": plan, "model": model, "cluster.cpu_slots": cpu_slots}
    settings = settings_from(config, options, override)
    measure_first(settings, dry_run=True)
    deployment = prepare(settings)
    replicas = len(deployment.plan.replicas)
    print(
        f"ok: {replicas} replicas on {len(deployment.devices)} devices "
        f"({deployment.devices[0].kind}), {deployment.why}"
    )
