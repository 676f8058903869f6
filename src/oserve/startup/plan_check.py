"""Checks of plans: whether this machine can run them, and whether a client may propose them."""

from collections.abc import Sequence

from oserve.config import Settings, parse_plan
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    Observation,
    OServeError,
    VllmBackend,
)
from oserve.engines.arguments import engine_arguments
from oserve.engines.memory_check import MemoryCheck, known_model
from oserve.plan import check_plan

_PLACE = "plan"


def check_engines(plan: DeploymentPlan, devices: tuple[Device, ...], settings: Settings) -> None:
    """Raise OServeError if an engine of the plan could not be started."""
    cpu = all(device.kind == "cpu" for device in devices)
    for spec in plan.replicas:
        if isinstance(spec.backend, VllmBackend):
            engine_arguments(
                spec,
                model=settings.model,
                served_model_name="",
                unix_socket="",
                platform="cpu" if cpu else "cuda",
                settings=settings.engines,
            )
    # Free memory is not checked here: running engines hold part of it.
    model = known_model(settings.model)
    memory = MemoryCheck(settings=settings.engines, devices=devices, model=model, free_bytes=0.0)
    memory.check_contexts(plan.replicas)


def known_devices(given: tuple[Device, ...], observation: Observation | None) -> tuple[Device, ...]:
    """The devices of a deployment, and of nodes that have come since."""
    seen = () if observation is None else observation.devices
    return (*given, *(device for device in seen if device not in given))


def allowed_plan(body: bytes, current: DeploymentPlan, devices: Sequence[Device]) -> DeploymentPlan:
    """The plan in the body of a call, if its sender may propose it.

    Every client may send plans, so such a plan may change only replicas: engine arguments, attached
    servers and the variables that hold their keys must be in force already. Raises OServeError for
    a plan that is invalid or changes more.
    """
    plan = parse_plan(body.decode("utf-8", errors="replace"), place=_PLACE)
    check_plan(plan, devices, place=_PLACE)
    known = {spec.backend for spec in current.replicas} | {VllmBackend()}
    for index, spec in enumerate(plan.replicas):
        if spec.backend not in known:
            field = "attach" if isinstance(spec.backend, AttachedBackend) else "engine_args"
            raise OServeError(
                "a plan from a client may not add one that is not in force already",
                place=f"{_PLACE}.replicas[{index}].{field}",
                remedy="start the server with this plan",
            )
    return plan
