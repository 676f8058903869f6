"""Traces: request records read, made and measured.

Readers for the public formats, a seeded generator, length scaling, and every latency, throughput
and goodput formula, once. It does not know servers: who replays a trace is above.
"""

from oserve.traces.metrics import Outcome, OutcomeStatus, Percentiles, Slo, Summary, summarise
from oserve.traces.read import read_trace
from oserve.traces.request import TraceRequest
from oserve.traces.scale import fit_lengths
from oserve.traces.synthesise import synthesise

__all__ = [
    "Outcome",
    "OutcomeStatus",
    "Percentiles",
    "Slo",
    "Summary",
    "TraceRequest",
    "fit_lengths",
    "read_trace",
    "summarise",
    "synthesise",
]
