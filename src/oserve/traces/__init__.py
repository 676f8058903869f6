"""Traces: readers, generators and metrics of request traces.

Readers for the public formats, seeded generators, length scaling, and the one implementation of
every latency, throughput and goodput formula. This package knows no servers; replay is above.
"""

from oserve.traces.metrics import (
    FailureKind,
    Outcome,
    OutcomeStatus,
    Percentiles,
    Slo,
    Summary,
    summarise,
)
from oserve.traces.mixes import CHANGE_PERIODS_S, MIX_CVS, MIX_TYPES, synthesise_mix
from oserve.traces.patterns import CHANGING_TYPES, PATTERNS, synthesise_pattern
from oserve.traces.read import BadRows, Skipped, read_trace
from oserve.traces.request import TraceRequest
from oserve.traces.scale import fit_lengths
from oserve.traces.synthesise import LengthModel, synthesise
from oserve.traces.units import TimeUnit

__all__ = [
    "CHANGE_PERIODS_S",
    "CHANGING_TYPES",
    "MIX_CVS",
    "MIX_TYPES",
    "PATTERNS",
    "BadRows",
    "FailureKind",
    "LengthModel",
    "Outcome",
    "OutcomeStatus",
    "Percentiles",
    "Skipped",
    "Slo",
    "Summary",
    "TimeUnit",
    "TraceRequest",
    "fit_lengths",
    "read_trace",
    "summarise",
    "synthesise",
    "synthesise_mix",
    "synthesise_pattern",
]
