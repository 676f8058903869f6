"""Workload types: classes of requests told apart by both lengths."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadType:
    """A class of requests and how often it comes.

    ``prompt_tokens`` and ``output_tokens`` are what a typical request of it has (means, so that
    rates of tokens come out right); ``arrival_rate_rps`` is in requests per second.
    """

    name: str
    prompt_tokens: float
    output_tokens: float
    arrival_rate_rps: float
