"""Handlers of the replicas' answers: responses, refusals, failures and broken connections."""

from msgspec.structs import replace

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.breaker import concerns_oserve, refuses, retryable_elsewhere
from oserve.control.dispatch.commands import Refusal
from oserve.control.dispatch.events import Cause
from oserve.control.dispatch.lifecycle import Lifecycle
from oserve.control.dispatch.state import (
    QUEUED,
    RESUMING,
    UNLIMITED_TOKENS,
    Booking,
    Held,
    Sent,
    Streaming,
)
from oserve.core import FinishStatus

_CLIENT_ERROR, _SERVER_ERROR = 400, 500


class Answers:
    """Handles the events that report a replica's answer to a request."""

    def __init__(self, life: Lifecycle) -> None:
        self._life = life

    def began(self, event: on.Began) -> None:
        """Hold the answer back until the first tokens show that it is good."""
        match self._life.at_replica(event.number):
            case state, Sent(booking):
                self._life.first_byte(state, booking)
                state.phase = Held(booking)
            case state, Streaming(booking, False):
                self._life.first_byte(state, booking)
                state.phase = Streaming(booking)

    def streams(self, event: on.Streams) -> None:
        """Forward a stream that has begun to the client."""
        found = self._life.at_replica(event.number)
        if found is not None and not isinstance(found[1], Streaming):
            state, phase = found
            if event.well:
                self._life.served(phase.booking.replica)
            self._life.forward(state, phase)

    def shown(self, event: on.Shown) -> None:
        """The client has part of a non-streaming answer."""
        found = self._life.at_replica(event.number)
        if found is not None and not isinstance(found[1], Streaming):
            state, phase = found
            if isinstance(phase, Sent):
                self._life.first_byte(state, phase.booking)
            state.phase = Streaming(phase.booking)

    def progressed(self, event: on.Progressed) -> None:
        """Extend the booking of an answer that is longer than expected."""
        match self._life.at_replica(event.number):
            case state, Streaming(Booking(_, entry)):
                if entry is None or state.forecast is None or state.request is None:
                    self._life.emit(do.Forward(state.number, UNLIMITED_TOKENS))
                    return
                made = event.made_tokens
                total = max(made + 1.0, state.forecast.beyond(made))
                entry.outgrown(total - state.booked_tokens, self._life.now_s)
                state.booked_tokens = int(total)
                self._life.emit(do.Forward(state.number, state.booked_tokens, True))

    def refused(self, event: on.Refused) -> None:
        """The replica answered with an error: retry on another replica, or forward the error."""
        found = self._life.at_replica(event.number)
        if found is None or isinstance(found[1], Streaming):
            return
        state, phase = found
        replica = phase.booking.replica
        if not retryable_elsewhere(event.status, attached=replica.attached):
            self._life.served(replica)
            self._life.forward(state, phase)
            return
        if not event.aborted and state.request is not None:
            self._life.failed(
                replica,
                event.reason,
                at_once=refuses(event.status),
                retry_after_s=event.retry_after_s,
            )
        if self._life.retry(state, phase, event.reason, died=False):
            return
        if state.request is not None and replica.attached and concerns_oserve(event.status):
            reason = f"it refuses OServe's request with status {event.status}"
            self._life.refuse(state, Refusal.REPLICA_FAILED, reason=reason)
        else:
            self._life.forward(state, phase)

    def lost(self, event: on.Lost) -> None:
        """The connection broke before the client had any of the answer: retry, or refuse."""
        found = self._life.at_replica(event.number)
        if found is None or isinstance(found[1], Streaming):
            return
        state, phase = found
        replica = phase.booking.replica
        refused = _CLIENT_ERROR <= event.status < _SERVER_ERROR
        if refused and not retryable_elsewhere(event.status, attached=replica.attached):
            # The replica refused the request and would again; only the error's text is lost.
            self._life.refuse(state, Refusal.REFUSED_WITHOUT_BODY, status=event.status)
            return
        self._life.failed(replica, event.reason, at_once=not event.connected)
        if not self._life.retry(state, phase, event.reason, died=True):
            self._life.refuse(state, Refusal.REPLICA_FAILED, reason=event.reason)

    def reworded(self, event: on.Reworded) -> None:
        """Send the request again without the refused option; this counts as no failed attempt."""
        match self._life.at_replica(event.number):
            case state, (Sent() | Held()) as phase:
                self._life.emit(do.LetGo(state.number))
                self._life.release(state, phase, tried=False)
                state.phase = QUEUED
                state.attempts -= 1
                self._life.enter(state)

    def broken(self, event: on.Broken) -> None:
        """Resume a broken stream on another replica, or end it."""
        match self._life.at_replica(event.number):
            case state, Streaming(booking) as phase:
                pass
            case _:
                return
        replica, rest = booking.replica, event.rest
        again = event.cause is Cause.DIVERGED
        if event.cause is Cause.LOST:
            self._life.failed(replica, event.reason)
        if (
            rest is not None
            and state.original is not None
            and state.moves < self._life.policy.max_moves
            and self._life.fleet.may_continue(state, replica.id, rest.context_tokens, again=again)
        ):
            self._life.emit(
                do.Resume(state.number, event.cause, replica.id, event.with_cache, event.reason)
            )
            self._life.release(state, phase, tried=not again)
            state.moves += 1
            state.made_tokens = rest.made_tokens
            state.request = replace(
                state.original,
                prompt_tokens=rest.context_tokens,
                output_tokens=round(state.remaining_tokens(rest.made_tokens)),
            )
            state.phase = RESUMING
            self._life.enter(state)
        elif event.can_end:
            self._life.emit(do.ShowError(state.number))
        elif event.cause is not Cause.HANDED_OVER:
            self._life.refuse(state, Refusal.REPLICA_FAILED, reason=event.reason)

    def finished(self, event: on.Finished) -> None:
        """Record a complete answer."""
        match self._life.at_replica(event.number):
            case state, phase:
                done = event.status is FinishStatus.COMPLETED
                # The end of a stream says nothing new: it counted when it began.
                if done and not (state.streams and isinstance(phase, Streaming)):
                    self._life.served(phase.booking.replica)
                self._life.release(state, phase, tried=False, done=done)
                self._life.end(state, event.status)
