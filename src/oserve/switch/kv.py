"""Requests that run on a replica about to leave: drain, move or replay.

Requests that end within the limit drain. The others continue elsewhere, by moving their KV cache
(section 4 of the method) or by replay, which computes prompt and tokens so far again: whichever
interrupts the stream for less time. Caches move only into room that leaves some headroom, longest
first, since those gain most. How a stream migrates is not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from oserve.perf.model import ModelFacts
from oserve.perf.roofline import kv_bytes_per_value
from oserve.switch.demand import Demands, ShardDemand, demands_of
from oserve.switch.layout import Contents, ShardPlacement
from oserve.switch.links import Links
from oserve.switch.precision import WeightFormat
from oserve.switch.tensor import Cut, CutKind, Parameter, TensorSpec
from oserve.switch.transfer import TransferPlan, plan_demands


class Way(StrEnum):
    """How a running request continues."""

    DRAIN = "drain"
    MOVE = "move"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A request on a replica that leaves.

    ``context_tokens``: prompt and output so far. ``remaining_tokens``: the expected rest of its
    output, at most what ``max_tokens`` leaves. ``carries`` is false if its state cannot move (as
    with guided decoding). ``target``: the replica it would continue on; empty if none has room.
    """

    id: str
    context_tokens: int
    remaining_tokens: float
    carries: bool = True
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRoom:
    """A replica that can take requests: tokens of KV cache, total and free, and its speeds.

    Caches move to it at ``bandwidth`` bytes/s. ``move_s`` and ``replay_s`` are the fixed costs of
    either way, ``prefill_s_per_token`` that of computing a token of context again.
    """

    kv_tokens: int
    free_tokens: int
    bandwidth: float
    prefill_s_per_token: float
    move_s: float = 0.05
    replay_s: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainPolicy:
    """A replica may drain for ``limit_s``; ``decode_s_per_token`` is its speed.

    ``headroom``: share of a target's KV cache that moved caches leave free.
    """

    limit_s: float
    decode_s_per_token: float
    headroom: float = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveVerdict:
    """How a request continues, why, and for how many seconds its stream stalls."""

    request: str
    way: Way
    reason: str
    gap_s: float = 0.0
    moved_bytes: float = 0.0


def decide_requests(
    requests: Sequence[RunningRequest],
    rooms: Mapping[str, TargetRoom],
    policy: DrainPolicy,
    *,
    kv_bytes_per_token: float,
) -> tuple[MoveVerdict, ...]:
    """Return a verdict for each request, in the order given."""
    free = {
        name: room.free_tokens - policy.headroom * room.kv_tokens for name, room in rooms.items()
    }
    verdicts: dict[str, MoveVerdict] = {}
    for request in sorted(requests, key=lambda one: (-one.context_tokens, one.id)):
        verdict = _verdict(request, rooms.get(request.target), free, policy, kv_bytes_per_token)
        verdicts[request.id] = verdict
        if verdict.way is Way.MOVE:
            free[request.target] -= request.context_tokens + request.remaining_tokens
    return tuple(verdicts[request.id] for request in requests)


def _verdict(
    request: RunningRequest,
    room: TargetRoom | None,
    free: Mapping[str, float],
    policy: DrainPolicy,
    kv_bytes_per_token: float,
) -> MoveVerdict:
    drain_s = request.remaining_tokens * policy.decode_s_per_token
    if drain_s <= policy.limit_s:
        return MoveVerdict(
            request=request.id,
            way=Way.DRAIN,
            reason=f"ends in about {drain_s:.1f} s, within the limit of {policy.limit_s:.1f} s",
        )
    if not request.carries:
        return MoveVerdict(
            request=request.id,
            way=Way.DRAIN,
            reason=f"its state cannot be carried over, though it needs about {drain_s:.1f} s",
        )
    if room is None:
        return MoveVerdict(
            request=request.id,
            way=Way.DRAIN,
            reason=f"no replica can take it, though it needs about {drain_s:.1f} s",
        )
    size = request.context_tokens * kv_bytes_per_token
    move_s = room.move_s + size / room.bandwidth
    replay_s = room.replay_s + request.context_tokens * room.prefill_s_per_token
    wanted = request.context_tokens + request.remaining_tokens
    if wanted > free[request.target]:
        return MoveVerdict(
            request=request.id,
            way=Way.REPLAY,
            gap_s=replay_s,
            reason=f"its cache of {wanted:.0f} tokens finds no room beside the headroom",
        )
    if move_s > replay_s:
        return MoveVerdict(
            request=request.id,
            way=Way.REPLAY,
            gap_s=replay_s,
            reason=f"computing it again takes {replay_s:.2f} s, moving it {move_s:.2f} s",
        )
    return MoveVerdict(
        request=request.id,
        way=Way.MOVE,
        gap_s=move_s,
        moved_bytes=size,
        reason=f"moving it takes {move_s:.2f} s, computing it again {replay_s:.2f} s",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMove:
    """Caches of some requests, ``tokens`` tokens in total, from one replica to another."""

    source: ShardPlacement
    target: ShardPlacement
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheContents(Contents):
    """A cache as a tensor per layer, [KV heads, tokens, 2 * head size].

    Ranks share layers and heads as they share those of the weights. ``tag`` distinguishes caches.
    """

    model: ModelFacts
    tokens: int
    tag: str = ""

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.layers

    def parameters(self, held: WeightFormat) -> tuple[Parameter, ...]:
        """Return one parameter, whose values are as wide as those of plain weights."""
        size = int(kv_bytes_per_value(held.plain))
        tensor = TensorSpec(
            name=f"model.layers.{{}}.self_attn.attn.kv{self.tag}",
            shape=(self.model.kv_heads, self.tokens, 2 * self.model.head_dim),
            dtype=held.plain.value,
            value_bytes=size,
            cut=Cut(kind=CutKind.KV_HEADS, units=self.model.kv_heads),
        )
        return (Parameter(name=tensor.name, parts=(tensor,)),)


def plan_caches(model: ModelFacts, moves: Sequence[CacheMove], links: Links) -> TransferPlan:
    """Return copies for all moves at once, balanced like those of weights.

    The name of a copy's tensor ends in ``@source>target``, the replicas' names; its second
    dimension counts the tokens of the move's requests one after another. Raises OServeError where
    the two hold caches of different types.
    """
    remote: tuple[ShardDemand, ...] = ()
    local: tuple[ShardDemand, ...] = ()
    for move in moves:
        tag = f"@{move.source.replica}>{move.target.replica}"
        contents = CacheContents(model=model, tokens=move.tokens, tag=tag)
        demands = demands_of(contents, [move.source], [move.target])
        remote += demands.remote
        local += demands.local
    return plan_demands(Demands(remote=remote, local=local), links)
