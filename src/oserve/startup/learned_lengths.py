"""Output lengths, learned from the requests of earlier servers."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from oserve.gateway.records import read_records
from oserve.workload.output import KnownAtArrival, OutputEstimator

_MOST_RECORDS = 5000


def learned_estimator(records_file: str) -> dict[str, Any] | None:
    """State of an ``OutputEstimator`` that knows the last requests; ``None`` without any."""
    estimator = OutputEstimator()
    with contextlib.suppress(sqlite3.Error):
        for record in read_records(Path(records_file), last=_MOST_RECORDS):
            known = KnownAtArrival(prompt_tokens=record.prompt_tokens)
            estimator.learn(known, record.output_tokens)
    return estimator.state() if estimator.seen else None
