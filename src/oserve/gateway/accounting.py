"""Accounting of ended requests: metrics, estimators and records."""

import time

from oserve.control.dispatch import commands as do
from oserve.core import FinishStatus, RequestRecord
from oserve.gateway.estimator import RequestEstimate, RequestEstimator
from oserve.gateway.metrics import Metrics
from oserve.gateway.records import RecordSink
from oserve.gateway.stream.session import Session
from oserve.workload import PromptLengthEstimator


class Accounting:
    """The accounting of one gateway process. ``records``: ``None`` without a record store."""

    def __init__(
        self,
        metrics: Metrics,
        estimator: RequestEstimator,
        lengths: PromptLengthEstimator,
        records: RecordSink | None,
    ) -> None:
        self._metrics = metrics
        self._estimator = estimator
        self._lengths = lengths
        self._records = records

    def ended(self, session: Session, estimate: RequestEstimate, ending: do.Record) -> None:
        """Count and record a request that has ended."""
        unix_s = time.time()
        e2e_s = time.monotonic() - session.arrival_s
        prompt_tokens, output_tokens = token_counts(session, ending)
        completed = ending.status is FinishStatus.COMPLETED
        kind = self._estimator.ended(
            estimate,
            completed=completed,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            now_s=unix_s,
        )
        if session.usage.prompt_tokens is not None and session.prompt_size is not None:
            self._lengths.learn(session.prompt_size, prompt_tokens)
        ttft_s = tpot_s = None
        if session.first_byte_s and session.streams:
            ttft_s = session.first_byte_s - session.arrival_s
            if output_tokens > 1:
                tpot_s = (e2e_s - ttft_s) / (output_tokens - 1)
        metrics = self._metrics
        metrics.count("oserve_requests", ending.status.value)
        metrics.histogram("oserve_request_duration_seconds", kind).observe(e2e_s)
        if ttft_s is not None:
            metrics.histogram("oserve_time_to_first_token_seconds", kind).observe(ttft_s)
        if completed:
            metrics.count("oserve_prompt_tokens", kind, by=prompt_tokens)
            metrics.count("oserve_output_tokens", kind, by=output_tokens)
        if self._records is None:
            return
        record = RequestRecord(
            arrival_s=unix_s - e2e_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            workload_type=kind,
            replica=ending.replica,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            e2e_s=e2e_s,
            status=ending.status,
            moves=ending.moves,
        )
        if not self._records.put(record):
            metrics.count("oserve_records_dropped")


def token_counts(session: Session, ending: do.Record) -> tuple[int, int]:
    """Prompt and output tokens as the engine reported them, or else as estimated."""
    usage = session.usage
    estimate = session.request.prompt_tokens if session.request is not None else 0
    # Without a report, each event of a stream carried about one token.
    counted = session.made_tokens if session.streams or ending.moves else 0
    return (
        estimate if usage.prompt_tokens is None else usage.prompt_tokens,
        counted if usage.output_tokens is None else usage.output_tokens,
    )
