"""The deployment plan: which replicas run where, and how requests are shared between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from oserve.core.endpoint import Endpoint
from oserve.core.shape import ReplicaShape

_VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBackend:
    """A vLLM engine that OServe starts, monitors and stops.

    vLLM receives ``engine_args`` verbatim after OServe's own arguments, so they take precedence.
    """

    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedBackend:
    """A running OpenAI-compatible server; OServe routes to it but never starts or stops it.

    OServe appends ``/v1/...`` to ``url``, which may have a path. ``model`` is the model's name on
    that server, where it differs. ``priority``: the server accepts vLLM's ``priority`` field.
    ``token_ids``: it accepts ``return_token_ids`` and prompts of token ids, so streams can migrate.
    ``stream_options``: it accepts that OpenAI field; OServe omits the field for a server that
    rejects it.
    ``api_key_env`` names the environment variable that holds the server's key. ``headers`` go with
    every request; a value ``$NAME`` is read from that variable. ``health``: the path of the health
    check from the server's root; empty: OServe probes for it. ``ca_file``: trusted CA certificates
    (PEM); empty: the system's.
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
        """Names of the environment variables that the backend reads."""
        named = [value[1:] for _, value in self.headers if _VARIABLE.fullmatch(value)]
        return tuple([self.api_key_env, *named] if self.api_key_env else named)

    def endpoint(self, variables: Mapping[str, str]) -> Endpoint:
        """The server's endpoint with these values of its variables; missing ones are empty."""
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
    """The desired state of one replica.

    ``devices`` lists device ids stage by stage; within a stage, in the order of tensor-parallel
    ranks.
    """

    id: str
    shape: ReplicaShape
    devices: tuple[str, ...]
    backend: Backend = field(default_factory=VllmBackend)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClass:
    """The requests whose prompt has up to ``max_prompt_tokens`` (``None``: no bound)."""

    name: str
    max_prompt_tokens: int | None = None
    output_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedType:
    """A workload type that a plan routes: the requests nearest to its centre, in tokens.

    The distance is Euclidean between log1p of both lengths, among types of the same ``tier``.
    ``shares`` by replica sum to 1.
    """

    name: str
    prompt_tokens: float
    output_tokens: float
    shares: Mapping[str, float]
    tier: str = ""


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
        """The planned replica of that id; ``None`` if the plan has none."""
        return next((spec for spec in self.replicas if spec.id == replica_id), None)
