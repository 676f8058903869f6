"""``oserve validate``: is this configuration sound?"""

from typing import Annotated

import typer

from oserve.app.deployment import prepare
from oserve.cli.options import (
    ConfigOption,
    CpuSlotsOption,
    ModelArgument,
    ModelOption,
    OverrideOption,
    once,
)
from oserve.cli.serve import measure_first, settings_from


def validate(
    model_argument: ModelArgument = None,
    model: ModelOption = None,
    plan: Annotated[
        str | None, typer.Option(help="Deployment plan (YAML): replicas, types, shares.")
    ] = None,
    config: ConfigOption = None,
    cpu_slots: CpuSlotsOption = None,
    override: OverrideOption = None,
) -> None:
    """Check settings and plan against this machine's devices; start nothing."""
    options = {
        "plan": plan,
        "model": once(model_argument, model, name="--model"),
        "cluster.cpu_slots": cpu_slots,
    }
    settings = settings_from(config, options, override)
    measure_first(settings, dry_run=True)
    deployment = prepare(settings)
    replicas = len(deployment.plan.replicas)
    print(
        f"ok: {replicas} replicas on {len(deployment.devices)} devices "
        f"({deployment.devices[0].kind}), {deployment.why}"
    )
