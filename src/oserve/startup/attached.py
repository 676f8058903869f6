"""The attached servers of a plan, checked before anything starts."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import AttachedBackend, DeploymentPlan, OServeError, ReplicaSpec
from oserve.engines.attached import AttachedProbe, Finding
from oserve.engines.probe import Probe

_ANSWER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedServer:
    """An attached server and the result of its check."""

    spec: ReplicaSpec
    url: str
    finding: Finding

    @property
    def line(self) -> str:
        """The result as one line."""
        found = self.finding
        if found.trouble:
            return f"{self.spec.id} at {self.url}: {found.trouble}"
        models = ", ".join(model.name for model in found.models or ())
        line = f"{self.spec.id} at {self.url}: answers; health at {found.health}"
        line += f"; models: {models}" if models else "; it lists no models"
        return f"{line}; {found.doubt}" if found.doubt else line


async def check_attached(
    plan: DeploymentPlan, variables: Mapping[str, str], *, model: str
) -> list[AttachedServer]:
    """Check that every attached server is healthy, serves the model and answers a request.

    ``model``: the name that clients use. ``variables``: environment variables that the plan names.
    """
    return list(
        await asyncio.gather(
            *(
                _ask(spec, spec.backend, variables, model)
                for spec in plan.replicas
                if isinstance(spec.backend, AttachedBackend)
            )
        )
    )


async def _ask(
    spec: ReplicaSpec, backend: AttachedBackend, variables: Mapping[str, str], model: str
) -> AttachedServer:
    endpoint = backend.endpoint(variables)
    async with Probe(endpoint, timeout_s=_ANSWER_S) as probe:
        finding = await AttachedProbe(probe, endpoint, backend.model or model).try_out()
    return AttachedServer(spec=spec, url=backend.url, finding=finding)


def refuse_unhealthy(asked: list[AttachedServer], *, place: str) -> None:
    """Raise OServeError if an attached server cannot serve."""
    troubled = [item for item in asked if item.finding.trouble]
    if troubled:
        remedies = dict.fromkeys(f"{item.spec.id}: {item.finding.remedy}" for item in troubled)
        raise OServeError(
            "attached servers cannot serve: " + "; ".join(item.line for item in troubled),
            place=place,
            remedy="; ".join(remedies),
        )
