"""How far a running request has come, and what is expected of the rest; for requests that move."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oserve.gateway.relay import Relay


def movable(relay: "Relay") -> bool:
    """Whether it could go on, or start again unseen, at another replica."""
    if not relay.committed:
        return relay.attempts < relay.dispatcher.max_attempts
    return relay.moving is not None and relay.moving.movable


def made_tokens(relay: "Relay") -> int:
    """About how many tokens the answer has so far."""
    return relay.moving.made_tokens if relay.committed and relay.moving is not None else 0


def context_tokens(relay: "Relay") -> int:
    """About how many tokens it would begin with elsewhere."""
    request = relay.first_request
    return (request.prompt_tokens if request is not None else 0) + made_tokens(relay)


def remaining_tokens(relay: "Relay") -> float:
    """How many more are expected."""
    made, expected = made_tokens(relay), relay.expected
    if expected is not None and expected.output is not None:
        return max(1.0, expected.output.beyond(made) - made)
    whole = relay.first_request.output_tokens if relay.first_request is not None else 1
    return max(1.0, whole - made)


def tpot_s(relay: "Relay") -> float:
    """Seconds per output token, as seen or else as expected."""
    made = made_tokens(relay)
    if made > 1:
        return (relay.last_chunk_s - relay.first_byte_s) / (made - 1)
    return relay.replica.decode_s_per_token if relay.replica is not None else 0.0
