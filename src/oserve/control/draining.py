"""The drain decision of the gateways: which running requests leave a vacated replica.

Requests that end soon stay. Where engines cannot move KV caches, the other requests are recomputed.
"""

from collections.abc import Sequence
from statistics import median

from oserve.control.dispatch.policy import DrainCandidate, Exit
from oserve.control.dispatch.table import TableReplica
from oserve.switch.kv import DrainPolicy, RunningRequest, TargetRoom, Way, decide_requests

# The bandwidth of cache transfers through files in memory.
_MOVE_BYTES_PER_S = 1e9
_ANY_TOKENS = 1 << 40
_EXITS = {Way.DRAIN: Exit.STAY, Way.REPLAY: Exit.REPLAY, Way.MOVE: Exit.WITH_CACHE}


def decide_exits(
    running: Sequence[DrainCandidate], others: Sequence[TableReplica], left_s: float
) -> Sequence[Exit]:
    """The decision for each running request, given the remaining replicas and the seconds left."""
    if not running:
        return []
    target = min((replica.id for replica in others), default="")
    folders = {item.endpoint.caches for item in others} - {""}
    moves = any(item.replica.endpoint.caches in folders for item in running)
    # With either way the engine queues the request until it has room.
    tokens = _ANY_TOKENS if moves else 0
    room = TargetRoom(
        kv_tokens=tokens,
        free_tokens=tokens,
        bandwidth=_MOVE_BYTES_PER_S,
        prefill_s_per_token=min((item.prefill_s_per_token for item in others), default=0.0),
    )
    requests = [
        RunningRequest(
            id=str(index),
            context_tokens=item.context_tokens,
            remaining_tokens=item.remaining_tokens,
            carries=item.movable,
            target=target,
        )
        for index, item in enumerate(running)
    ]
    verdicts = decide_requests(
        requests,
        {target: room} if target else {},
        DrainPolicy(limit_s=left_s, decode_s_per_token=median(item.tpot_s for item in running)),
        kv_bytes_per_token=max((item.kv_bytes_per_token for item in others), default=0.0),
    )
    return [_EXITS[verdict.way] for verdict in verdicts]
