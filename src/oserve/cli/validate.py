"""``oserve validate``: check a configuration."""

import asyncio
from typing import Annotated

import typer

from oserve.cli.options import (
    ConfigOption,
    CpuSlotsOption,
    ModelArgument,
    ModelOption,
    OverrideOption,
    argument_or_option,
)
from oserve.cli.serve import measure_first, settings_from
from oserve.config import backend_keys
from oserve.startup.attached import check_attached, refuse_unhealthy
from oserve.startup.deployment import prepare
from oserve.startup.node_fleet import foreseen


def validate(
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    plan: Annotated[
        str | None, typer.Option(help="Deployment plan (YAML): replicas, types, shares.")
    ] = None,
    config: ConfigOption = None,
    cpu_slots: CpuSlotsOption = None,
    override: OverrideOption = None,
    ask: Annotated[
        bool, typer.Option(help="Probe attached servers with a request for one token.")
    ] = True,
) -> None:
    """Check settings and plan against this machine's devices, and probe attached servers.

    Starts nothing.
    """
    options = {
        "plan": plan,
        "model": argument_or_option(model_argument, model, name="--model"),
        "cluster.cpu_slots": cpu_slots,
    }
    settings = settings_from(config, options, override)
    nodes = asyncio.run(foreseen(settings))
    if nodes is None:
        measure_first(settings, dry_run=True)
    deployment = prepare(settings, nodes)
    if ask:
        variables = backend_keys(deployment.plan)
        asked = asyncio.run(check_attached(deployment.plan, variables, model=deployment.models[0]))
        for item in asked:
            print(item.line)
        refuse_unhealthy(asked, place=deployment.settings.plan or "plan")
    replicas = len(deployment.plan.replicas)
    print(
        f"ok: {replicas} replicas on {len(deployment.devices)} devices "
        f"({deployment.devices[0].kind}), {deployment.why}"
    )
