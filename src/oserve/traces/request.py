"""One request of a trace."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """``arrival_s`` counts from the start of the trace; lengths are in tokens, at least 1.

    ``tier`` and ``tenant``: those of the request, "" where the trace has none.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session: str = ""
    model: str = ""
    tier: str = ""
    tenant: str = ""
