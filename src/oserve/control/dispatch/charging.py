"""Charges a request that is sent, and gives its rank in the engine's queue."""

from oserve.control.dispatch.fair import FairQueue
from oserve.control.dispatch.fleet import Choice
from oserve.control.dispatch.overload import DEMOTED_S
from oserve.control.dispatch.state import RequestState

# The most that a tier's urgency moves a request in an engine's queue.
_MOST_SHIFT_S = 60.0


def uncharge(fair: FairQueue, state: RequestState) -> None:
    """Settle what a request that enters again was charged where it was.

    What a replica failed to finish is not charged.
    """
    if state.charge is None:
        return
    if not state.made_tokens:
        state.charge.prompt_s = 0.0
    settled, state.charge = state.charge, None
    fair.settle(settled, max(0, state.made_tokens - settled.made_tokens))


def charged_rank_s(
    fair: FairQueue,
    state: RequestState,
    choice: Choice,
    now_s: float,
    replicas: int,
    *,
    passes: bool = False,
) -> float:
    """Charge a request of a tenant; returns its rank in the engine's queue.

    While one tenant alone is active, that is the rank that it has without fair shares. A prompt
    that is computed again because its stream moved is not charged.
    """
    if not state.tenant:
        return state.rank_s
    per_token_s = choice.decode_s_per_token * choice.replica.devices
    tokens = state.request.output_tokens if state.request is not None else 0
    prompt_s = choice.route.work_s * choice.replica.devices - per_token_s * tokens
    state.charge = fair.charge(
        state,
        prompt_s=0.0 if state.made_tokens else max(0.0, prompt_s),
        per_token_s=per_token_s,
        passes=passes,
    )
    state.charge.made_tokens = state.made_tokens
    rank_s = fair.engine_rank_s(state.charge, now_s, replicas)
    if not fair.several:
        return state.rank_s
    if state.urgency_s:
        rank_s += max(-_MOST_SHIFT_S, min(_MOST_SHIFT_S, state.urgency_s))
    return rank_s + DEMOTED_S if state.demoted else rank_s
