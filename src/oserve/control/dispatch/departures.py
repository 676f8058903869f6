"""Running requests leave a vacated replica, a few at a time."""

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.lifecycle import Lifecycle
from oserve.control.dispatch.policy import DrainCandidate, DrainDecision, Exit
from oserve.control.dispatch.state import (
    Booking,
    Held,
    Placed,
    ReplicaStart,
    RequestState,
    Sent,
    Streaming,
)

# A departing request is parsed in full first; small batches keep that from delaying other streams.
_LEAVE_AT_ONCE = 4


class Departures:
    """Handles vacated replicas. ``drain`` decides which requests leave, and how."""

    def __init__(self, life: Lifecycle, drain: DrainDecision) -> None:
        self._life = life
        self._drain = drain

    def check(self, start: ReplicaStart) -> None:
        """Ask for the progress of the requests at a replica."""
        numbers = tuple(
            number for number, (_, booking) in self._at(start).items() if booking.entry is not None
        )
        vacating = self._life.fleet.vacating
        if not numbers:
            vacating.stop_checks(start)
            return
        vacating.checked(start, self._life.now_s)
        rest = tuple(number for number in numbers if number not in vacating.asked(start))
        if rest:
            self._life.emit(do.Survey(*start, rest))

    def _at(self, start: ReplicaStart) -> dict[int, tuple[RequestState, Booking]]:
        return {
            number: (state, state.phase.booking)
            for number, state in self._life.requests.items()
            if isinstance(state.phase, Placed) and state.phase.booking.start == start
        }

    def surveyed(self, event: on.Surveyed) -> None:
        """Make the selected requests leave, a few at a time."""
        start = (event.replica, event.started_s)
        vacating = self._life.fleet.vacating
        left_s = vacating.left_s(start, self._life.now_s)
        present = self._at(start)
        running = [
            (state, self._candidate(state, booking, event.progress[number]))
            for number, (state, booking) in present.items()
            if number in event.progress
        ]
        if not running:
            return
        exits = self._drain(
            [candidate for _, candidate in running], list(self._life.fleet.serving.values()), left_s
        )
        under_way = len(vacating.asked(start) & present.keys())
        leaving: list[int] = []
        for (state, _), leaves in zip(running, exits, strict=True):
            others = under_way + len(leaving)
            if leaves is Exit.STAY or (left_s > 0.0 and not self._has_room(state, start, others)):
                continue
            if len(leaving) == _LEAVE_AT_ONCE:
                vacating.go_on(start, self._life.now_s)
                break
            if self._depart(state, with_cache=leaves is Exit.WITH_CACHE):
                leaving.append(state.number)
        vacating.ask(start, leaving)
        self._life.due_s = min(self._life.due_s, vacating.next_s)

    def _candidate(
        self, state: RequestState, booking: Booking, progress: on.Progress
    ) -> DrainCandidate:
        made = progress.made_tokens
        movable = progress.movable and state.moves < self._life.policy.max_moves
        if not isinstance(state.phase, Streaming):
            movable = state.attempts < self._life.policy.max_attempts
        prompt = state.original.prompt_tokens if state.original is not None else 0
        return DrainCandidate(
            replica=booking.replica,
            context_tokens=prompt + made,
            remaining_tokens=state.remaining_tokens(made),
            movable=movable,
            tpot_s=progress.tpot_s or booking.replica.decode_s_per_token,
        )

    def _has_room(self, state: RequestState, present: ReplicaStart, leaving: int) -> bool:
        request = state.request
        return request is not None and self._life.fleet.has_room(
            state, request, present[0], leaving=leaving
        )

    def _depart(self, state: RequestState, *, with_cache: bool) -> bool:
        """Make a request leave its replica; returns whether it was asked to leave."""
        match state.phase:
            case Streaming():
                self._life.emit(do.Depart(state.number, with_cache))
                return True
            case (Sent() | Held()) as phase:
                return self._life.retry(state, phase, "it is being vacated", died=True)
            case _:
                return False
