"""The deployment plan: which replicas run where, and how requests are shared between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from oserve.core.endpoint import Endpoint
from oserve.core.shape import ReplicaShape

_VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBackend:
    """A vLLM engine that OServe starts, watches and ends.

    ``engine_args`` go to vLLM verbatim, after OServe's own, so that they win.
    """

    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedBackend:
    """Any running OpenAI-compatible server; OServe routes to it but never starts or ends it.

    ``url`` may have a path, to which ``/v1/...`` is added. ``model`` is its name there, where that
    differs. ``priority`` says that the server takes vLLM's ``priority`` field, ``token_ids`` that
    it takes ``return_token_ids`` and prompts of ids, so that streams can move; others refuse
    unknown fields. ``stream_options``: it knows that field of OpenAI's; one that refuses it is
    asked without in any case.
    ``api_key_env`` names the environment variable that holds the server's key. ``headers`` go with
    every request; a value ``$NAME`` is that variable's. ``health``: path, from the server's root,
    that tells whether it is well; empty: it is found. ``ca_file``: certificates (PEM) of the
    authorities that vouch for it; empty: the system's.
    """

    url: str
    model: str = ""
    api_key_env: str | None = None
    priority: bool = False
    token_ids: bool = False
    stream_options: bool = True
    health: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    ca_file: str = ""

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the environment variables that it takes values from."""
        named = [value[1:] for _, value in self.headers if _VARIABLE.fullmatch(value)]
        return tuple([self.api_key_env, *named] if self.api_key_env else named)

    def endpoint(self, variables: Mapping[str, str]) -> Endpoint:
        """Where it answers, given the values of its variables; one that is missing is empty."""
        return Endpoint(
            url=self.url,
            api_key=variables.get(self.api_key_env or "", ""),
            headers=tuple(
                (name, variables.get(value[1:], "") if _VARIABLE.fullmatch(value) else value)
                for name, value in self.headers
            ),
            health=self.health,
            ca_file=self.ca_file,
        )


Backend = VllmBackend | AttachedBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica as wished for. ``devices`` holds device ids, tensor-parallel ranks first."""

    id: str
    shape: ReplicaShape
    devices: tuple[str, ...]
    backend: Backend = field(default_factory=VllmBackend)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClass:
    """A workload type told by prompt length: up to ``max_prompt_tokens`` (``None``: no bound)."""

    name: str
    max_prompt_tokens: int | None = None
    output_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedType:
    """A workload type told by both lengths, in tokens: requests belong to the nearest centre.

    Nearest in the plane of log1p of both. ``shares`` by replica sum to 1.
    """

    name: str
    prompt_tokens: float
    output_tokens: float
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """Desired state: replicas, length classes, and routing shares over the replicas.

    ``routing_shares[length class][replica]`` is a fraction; the shares of one class sum to 1. A
    computed plan also has ``planned_types``. The router then sends a request by the probabilities
    that it is of each of these types, and the length classes only describe the plan to people.
    """

    id: str
    replicas: tuple[ReplicaSpec, ...]
    length_classes: tuple[LengthClass, ...]
    routing_shares: Mapping[str, Mapping[str, float]]
    planned_types: tuple[PlannedType, ...] = ()

    def replica(self, replica_id: str) -> ReplicaSpec | None:
        """The wished-for replica of that id, if the plan has one."""
        return next((spec for spec in self.replicas if spec.id == replica_id), None)
