"""A request as the router sees it, and the record of a finished request.

Both are made for every request, and structs are made many times faster than frozen dataclasses.
"""

from enum import StrEnum

import msgspec

from oserve.core.tier import Promise


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request at the time of routing. Lengths are estimates, in tokens.

    ``probabilities``: those of the plan's types, in their order; empty if the plan has none.
    ``workload_type`` is then the most likely one. ``promise``: of its service tier; ``None``
    without tiers.
    """

    id: str
    arrival_s: float
    workload_type: str
    prompt_tokens: int
    output_tokens: int
    probabilities: tuple[float, ...] = ()
    promise: Promise | None = None


class FinishStatus(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    CLIENT_ERROR = "client_error"
    FAILED = "failed"
    REJECTED = "rejected"
    DISCONNECTED = "disconnected"


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request. The record holds nothing of its prompt or answer.

    ``arrival_s`` is Unix time. ``ttft_s`` includes queueing; ``tpot_s`` is
    (e2e - ttft)/(output tokens - 1); both are ``None`` where undefined. ``moves``: how often the
    request migrated to another replica. ``tier`` and ``tenant`` are "" without any; ``kept``:
    whether it was served within the limits of its tier, ``None`` without a tier.
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
    tier: str = ""
    tenant: str = ""
    kept: bool | None = None
