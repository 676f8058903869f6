"""What is counted, learned and recorded of a request when it has ended."""

import time
from typing import TYPE_CHECKING

from oserve.core import FinishStatus, RequestRecord
from oserve.gateway.estimator import Expected

if TYPE_CHECKING:
    from oserve.gateway.dispatch import Dispatcher
    from oserve.gateway.relay import Relay


def token_counts(relay: "Relay") -> tuple[int, int]:
    """Prompt and output tokens: as the engine reported them, else our best count."""
    usage = relay.usage
    estimate = relay.first_request.prompt_tokens if relay.first_request is not None else 0
    # Without a report, each event of a stream carried about one token.
    counted = relay.events if relay.stream else 0
    if relay.moving is not None and relay.moves:
        counted = relay.moving.made_tokens
    return (
        estimate if usage.prompt_tokens is None else usage.prompt_tokens,
        counted if usage.output_tokens is None else usage.output_tokens,
    )


def account(
    dispatcher: "Dispatcher", relay: "Relay", expected: Expected, status: FinishStatus
) -> None:
    """Count and record a request that has ended."""
    unix_s = time.time()
    e2e_s = time.monotonic() - relay.arrival_s
    prompt_tokens, output_tokens = token_counts(relay)
    kind = dispatcher.foresight.ended(
        expected,
        completed=status is FinishStatus.COMPLETED,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        now_s=unix_s,
    )
    if relay.usage.prompt_tokens is not None and relay.prompt_size is not None:
        dispatcher.lengths.learn(relay.prompt_size, prompt_tokens)
    ttft_s = tpot_s = None
    if relay.first_byte_s and relay.stream:
        ttft_s = relay.first_byte_s - relay.arrival_s
        if output_tokens > 1:
            tpot_s = (e2e_s - ttft_s) / (output_tokens - 1)
    metrics = dispatcher.metrics
    metrics.count("oserve_requests", status.value)
    metrics.histogram("oserve_request_duration_seconds", kind).observe(e2e_s)
    if ttft_s is not None:
        metrics.histogram("oserve_time_to_first_token_seconds", kind).observe(ttft_s)
    if status is FinishStatus.COMPLETED:
        metrics.count("oserve_prompt_tokens", kind, by=prompt_tokens)
        metrics.count("oserve_output_tokens", kind, by=output_tokens)
    record = RequestRecord(
        arrival_s=unix_s - e2e_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        workload_type=kind,
        replica=relay.replica.id if relay.replica is not None else "",
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        status=status,
        moves=relay.moves,
    )
    if dispatcher.records is not None and not dispatcher.records.put(record):
        metrics.count("oserve_records_dropped")
