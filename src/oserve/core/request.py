"""A request as the router sees it, and the row it leaves behind."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is known of a request when it must be routed. Lengths are estimates, in tokens.

    ``chances`` are those of the plan's types, in their order, where it has any: the answer decides
    which one it is. ``workload_type`` is then the likeliest.
    """

    id: str
    arrival_s: float
    workload_type: str
    prompt_tokens: int
    output_tokens: int
    chances: tuple[float, ...] = ()


class FinishStatus(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    CLIENT_ERROR = "client_error"
    FAILED = "failed"
    REJECTED = "rejected"
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One finished request. Nothing of its prompt or answer is kept.

    ``arrival_s`` is Unix time. ``ttft_s`` includes queueing; ``tpot_s`` is
    (e2e - ttft)/(output tokens - 1); both are ``None`` where they have no meaning. ``moves``: how
    often it went on at another replica.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    workload_type: str
    replica: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    status: FinishStatus
    moves: int = 0
