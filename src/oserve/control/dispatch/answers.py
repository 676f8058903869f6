"""What replicas do with the requests that they were sent: answer, refuse, fail, break off."""

from msgspec.structs import replace

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.breaker import concerns_us, refuses, worth_elsewhere
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
    """Handlers of what replicas do."""

    def __init__(self, life: Lifecycle) -> None:
        self._life = life

    def began(self, event: on.Began) -> None:
        """The replica has begun to answer."""
        match self._life.at_replica(event.number):
            case state, Sent(booking):
                self._life.first_byte(booking)
                state.phase = Held(booking)
            case state, Streaming(booking, False):
                self._life.first_byte(booking)
                state.phase = Streaming(booking)

    def streams(self, event: on.Streams) -> None:
        """A stream has begun: the client may have it."""
        found = self._life.at_replica(event.number)
        if found is not None and not isinstance(found[1], Streaming):
            state, phase = found
            if event.well:
                self._life.served(phase.booking.replica)
            self._life.forward(state, phase)

    def shown(self, event: on.Shown) -> None:
        """The client has part of an answer that is no stream."""
        found = self._life.at_replica(event.number)
        if found is not None and not isinstance(found[1], Streaming):
            state, phase = found
            if isinstance(phase, Sent):
                self._life.first_byte(phase.booking)
            state.phase = Streaming(phase.booking)

    def progressed(self, event: on.Progressed) -> None:
        """Book what is expected of an answer that is this long already."""
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
        """The replica answered with an error; another may do better."""
        found = self._life.at_replica(event.number)
        if found is None or isinstance(found[1], Streaming):
            return
        state, phase = found
        replica = phase.booking.replica
        if not worth_elsewhere(event.status, attached=replica.attached):
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
        if state.request is not None and replica.attached and concerns_us(event.status):
            reason = f"it refuses OServe's request with status {event.status}"
            self._life.refuse(state, Refusal.REPLICA_FAILED, reason=reason)
        else:
            self._life.forward(state, phase)

    def lost(self, event: on.Lost) -> None:
        """The answer broke off before the client had any of it."""
        found = self._life.at_replica(event.number)
        if found is None or isinstance(found[1], Streaming):
            return
        state, phase = found
        replica = phase.booking.replica
        refused = _CLIENT_ERROR <= event.status < _SERVER_ERROR
        if refused and not worth_elsewhere(event.status, attached=replica.attached):
            # It was answered, and would be again; only the words are lost.
            self._life.refuse(state, Refusal.REFUSED_UNHEARD, status=event.status)
            return
        self._life.failed(replica, event.reason, at_once=not event.connected)
        if not self._life.retry(state, phase, event.reason, died=True):
            self._life.refuse(state, Refusal.REPLICA_FAILED, reason=event.reason)

    def reworded(self, event: on.Reworded) -> None:
        """Asked once more, better worded: that is no failed attempt."""
        match self._life.at_replica(event.number):
            case state, (Sent() | Held()) as phase:
                self._life.emit(do.LetGo(state.number))
                self._life.release(state, phase, tried=False)
                state.phase = QUEUED
                state.attempts -= 1
                self._life.enter(state)

    def broken(self, event: on.Broken) -> None:
        """A stream that the client has part of goes on elsewhere, or ends."""
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
        """The answer is over."""
        match self._life.at_replica(event.number):
            case state, phase:
                done = event.status is FinishStatus.COMPLETED
                # The end of a stream says nothing new: it counted when it began.
                if done and not (state.streams and isinstance(phase, Streaming)):
                    self._life.served(phase.booking.replica)
                self._life.release(state, phase, tried=False, done=done)
                self._life.end(state, event.status)
