"""What a cluster looks like when observed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from oserve.core.endpoint import Endpoint
from oserve.core.plan import ReplicaSpec
from oserve.core.shape import Device


class ReplicaPhase(StrEnum):
    """Life of a replica: it starts loading, serves when ready, drains, and is gone.

    One that is to get its weights from others is on standby before it is ready. One that hangs is
    being ended, and has no requests any more.
    """

    LOADING = "loading"
    STANDBY = "standby"
    READY = "ready"
    DRAINING = "draining"
    HUNG = "hung"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """What an engine has done since it started, in counters that only grow.

    ``steps``; ``prompt_tokens`` that they computed and ``prompts`` that they ended;
    ``output_tokens`` that came out; ``gaps`` and ``gap_s``: how many times between one step and the
    next were taken, and their sum in seconds.
    """

    steps: int = 0
    prompt_tokens: int = 0
    prompts: int = 0
    output_tokens: int = 0
    gaps: int = 0
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One replica as it is. ``max_model_len`` (tokens) is 0 until the engine has told it.

    ``since_s``: when this phase began; ``started_s``: when its engine was started or taken up,
    which tells two engines of one replica apart. ``work`` is ``None`` where the engine does not
    tell. ``silent_s``: since its engine last showed a sign of life; past ``patience_s`` it is taken
    to hang.
    """

    spec: ReplicaSpec
    phase: ReplicaPhase
    endpoint: Endpoint
    since_s: float
    started_s: float = 0.0
    pid: int = 0
    max_model_len: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    work: EngineWork | None = None
    silent_s: float = 0.0
    patience_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailures:
    """Ends of a replica that nobody asked for, since it last served for a good while.

    ``spec`` is what failed: a changed spec starts with a clean sheet.
    """

    spec: ReplicaSpec
    count: int
    last_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The cluster at one moment (``now_s``, the clock's seconds)."""

    now_s: float
    devices: tuple[Device, ...]
    replicas: tuple[ReplicaState, ...]
    failures: Mapping[str, StartFailures] = field(default_factory=dict)

    def replica(self, replica_id: str) -> ReplicaState | None:
        """The observed replica of that id, if there is one that is not gone."""
        for state in self.replicas:
            if state.spec.id == replica_id and state.phase is not ReplicaPhase.GONE:
                return state
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What the router knows of one replica that may take requests.

    ``work_s``: seconds of engine time promised and not yet done. ``prefill_s_per_token`` and
    ``decode_s_per_token``: engine time one more token costs there. ``max_inflight`` bounds what
    the gateway hands over at once; ``max_model_len`` is 0 when unknown.
    """

    replica: str
    work_s: float
    inflight: int
    max_inflight: int
    prefill_s_per_token: float
    decode_s_per_token: float
    max_model_len: int = 0
