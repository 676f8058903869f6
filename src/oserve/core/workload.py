"""Workload types: classes of requests by prompt and output length."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadType:
    """A class of requests and its arrival rate in requests per second.

    ``prompt_tokens`` and ``output_tokens`` are means, so that token rates are exact. ``tier``: the
    service tier of all its requests; "" without tiers.
    """

    name: str
    prompt_tokens: float
    output_tokens: float
    arrival_rate_rps: float
    tier: str = ""
