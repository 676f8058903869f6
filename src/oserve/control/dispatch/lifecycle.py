"""The transitions of a request: dispatch, hold, forward, retry, refuse, end.

The event handlers are composed of these. Each keeps phase, queue and bookings consistent.
"""

import math

from oserve.control.dispatch import commands as do
from oserve.control.dispatch.charging import charged_rank_s, uncharge
from oserve.control.dispatch.commands import REJECTIONS, Command, Refusal
from oserve.control.dispatch.fleet import Fleet
from oserve.control.dispatch.passing import FreeSlots
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.router import NoRoute
from oserve.control.dispatch.state import (
    QUEUED,
    UNLIMITED_TOKENS,
    Booking,
    Ended,
    Placed,
    ReplicaStart,
    RequestState,
    Resuming,
    Sent,
    Streaming,
)
from oserve.control.dispatch.table import TableReplica
from oserve.control.dispatch.tiers import first_token_in_s
from oserve.control.dispatch.vacating import NEVER_S
from oserve.control.dispatch.waiting import WaitingRoom
from oserve.core import FinishStatus, OverloadAction, Tier
from oserve.core.faults import fault


class Lifecycle:
    """Requests, queue and replicas of one gateway process, and the commands of one event.

    ``requests``: open requests by number, in order of arrival. ``now_s``: the time of the current
    event. ``due_s``: when the next ``Tick`` is needed.
    """

    def __init__(self, policy: DispatchPolicy) -> None:
        self.policy = policy
        self.requests: dict[int, RequestState] = {}
        self.fleet = Fleet(policy)
        self.waiting = WaitingRoom(
            policy.overload, -(-policy.max_queued // policy.processes), self.fleet.saved_s
        )
        self.waiting.fair.use(policy.fair)
        self.now_s = 0.0
        self.due_s = NEVER_S
        self.commands: list[Command] = []
        # Requests that entered with these events; whether a slot became free.
        self._entered: list[RequestState] = []
        self._freed = False

    def share(self, processes: int) -> None:
        """This is one of so many gateway processes: its part of the limits."""
        self.waiting.limit(-(-self.policy.max_queued // processes))
        self.fleet.share(processes)

    def emit(self, command: Command) -> None:
        """Append a command."""
        self.commands.append(command)

    # -- dispatch -------------------------------------------------------------------------------
    def enter(self, state: RequestState) -> None:
        """Enter a request, which waits until ``settle``. Auxiliary calls are dispatched at once."""
        if state.request is None:
            self._send_auxiliary(state)
        else:
            uncharge(self.waiting.fair, state)
            self._entered.append(state)

    def breaks_promise(self, state: RequestState) -> bool:
        """Refuse a request that has just arrived if its tier rejects what cannot be in time."""
        promise, request = state.promise, state.request
        if promise is None or promise.tier.overload is not OverloadAction.REJECT:
            return False
        # Here the limits count that the client may have tightened.
        due_s = None if request is None else promise.first_token_s(request.output_tokens)
        if request is None or due_s is None:
            return False
        fleet = self.fleet
        ahead, ahead_tokens = self.waiting.ahead_of(state)
        expected_s = first_token_in_s(
            fleet.loads_for(state, self.now_s),
            prompt_tokens=request.prompt_tokens,
            first_token_s=fleet.ledger.first_token_s,
            ahead=ahead,
            ahead_tokens=ahead_tokens,
        )
        if expected_s <= due_s or math.isinf(expected_s):
            return False
        self.refuse(
            state,
            Refusal.PROMISE,
            reason=f"{expected_s:.3g} s, with a limit of {due_s:.3g} s"
            f" in tier {promise.tier.name!r}",
            retry_after_s=max(1, math.ceil(expected_s - due_s)),
        )
        return True

    def settle(self) -> None:
        """Dispatch by rank; hold or refuse new requests for which no replica has room.

        Called once per batch of events, so that the rank decides between requests that enter
        together, not the order of the events.
        """
        entered = self._entered
        if len(entered) == 1 and not self.waiting:
            # As below, without the detour through an empty queue.
            state = entered.pop()
            refused = self._try_send(state) if state.number in self.requests else None
            if refused is not None:
                self.waiting.push(state)
                self.waiting.fair.end_round()
                self._wait(state, no_replica=refused is NoRoute.NO_REPLICA)
                self._wake()
            return
        if entered:
            self._entered = []
            for state in entered:
                if state.number in self.requests:
                    self.waiting.push(state)
        elif not self._freed:
            return
        self._pump()
        # If the queue is full, the latest arrivals are refused.
        for state in sorted(entered, key=lambda item: -item.number):
            if state in self.waiting:
                self._wait(state, no_replica=not self.fleet.may_serve(state, self.now_s))
        if self._freed:
            self._pump()
        self._wake()

    def may_settle(self) -> None:
        """Let ``settle`` dispatch: a replica may have room for a waiting request."""
        if self.waiting:
            self._freed = True

    def _wake(self) -> None:
        """Schedule a ``Tick`` for the end of a back-off that a request waits for."""
        if self.waiting:
            self.due_s = min(self.due_s, self.fleet.breakers.next_s(self.now_s))

    def _wait(self, state: RequestState, *, no_replica: bool) -> None:
        """Keep a request in the queue, or refuse it. ``no_replica``: not even a full one serves."""
        if no_replica and not self.fleet.table.expected:
            self.refuse(state, Refusal.NO_REPLICA)
        elif not isinstance(state.phase, Resuming) and self._crowded(state):
            self.refuse(state, Refusal.QUEUE_FULL, retry_after_s=self.retry_after_s())
        else:
            state.give_up_s = self.now_s + self.policy.no_replica_wait_s if no_replica else None
            self.waiting.set_timers(state)
            self.due_s = min(self.due_s, self.waiting.next_s)
            self.emit(do.Hold(state.number))

    def _over_share(self, state: RequestState) -> bool:
        """Whether a request leaves slots free for tenants with less than their share."""
        fair = self.waiting.fair
        may = fair.several and bool(state.tenant) and not isinstance(state.phase, Resuming)
        return may and fair.over_share(state, self.fleet.slots)

    def _crowded(self, state: RequestState) -> bool:
        """Whether a request finds no place to wait; another tenant may have to make room for it."""
        if state.owner and self.waiting.owned.get(state.owner, 0) > state.max_queued:
            return True
        if not self.waiting.full:
            return False
        other = self.waiting.crowded_out(state) if state.tenant else state
        if other is state:
            return True
        self.refuse(other, Refusal.QUEUE_FULL, retry_after_s=self.retry_after_s())
        return False

    def _try_send(self, state: RequestState, *, passes: bool = False) -> NoRoute | None:
        """Send a request to the replica that the router picks; returns the reason if none can."""
        request = state.request
        if request is None:
            return NoRoute.NO_REPLICA
        booking: Booking | None = None
        try:
            choice = self.fleet.choose(state, request, self.now_s, tight=self._over_share(state))
            if isinstance(choice, NoRoute):
                return choice
            booking = self.fleet.book(state, request, choice, self.now_s)
            replicas = len(self.fleet.serving)
            rank = charged_rank_s(
                self.waiting.fair, state, choice, self.now_s, replicas, passes=passes
            )
        except Exception as error:  # an unforeseen fault in routing one request ends only that one
            if booking is not None:
                self.fleet.unbook(booking, self.now_s)
                if state.charge is not None:
                    # It was not sent.
                    state.charge.prompt_s = 0.0
            self.refuse(state, Refusal.INTERNAL, reason=fault(error))
            return None
        send = do.Send(
            number=state.number,
            replica=choice.replica,
            rank_s=rank,
            reason=choice.route.reason,
            cached_tokens=choice.cached_tokens,
            resumes=isinstance(state.phase, Resuming),
        )
        self._place(state, booking, send)
        return None

    def _send_auxiliary(self, state: RequestState) -> None:
        found = self.fleet.any_open(state, self.now_s)
        if found is None:
            # It does not wait, even if a replica is starting.
            self.refuse(state, Refusal.NO_REPLICA, reason="No replica can serve now")
        else:
            self._place(state, Booking(found, None), do.Send(number=state.number, replica=found))

    def _place(self, state: RequestState, booking: Booking, send: do.Send) -> None:
        state.attempts += 1
        state.replica = booking.replica.id
        state.phase = Streaming(booking, False) if send.resumes else Sent(booking)
        if state.request is not None:
            state.booked_tokens = state.made_tokens + state.request.output_tokens
        self.waiting.discard(state)
        self.emit(send)

    def _pump(self) -> None:
        """Send waiting requests, best rank first, while a replica has room for the first one."""
        self._freed = False
        while (state := self.waiting.head()) is not None:
            if self._demoted(state) or self._try_send(state) is None:
                continue
            if self.fleet.any_room:
                self._pump_past()
            break
        self.waiting.fair.end_round()

    def _pump_past(self) -> None:
        """Send requests past those that only full replicas can serve, by rank.

        The passed requests lose nothing: they cannot use the free slots.
        """
        # By the replicas that are barred: the shortest prompt for which no replica has room.
        blocked_tokens: dict[tuple[frozenset[ReplicaStart], bool, Tier | None], float] = {}
        slots = FreeSlots(self.waiting.fair.woke)
        for state in self.waiting.passing(slots.skips):
            tight = self._over_share(state)
            barred = frozenset(state.tried), state.moves > 0, state.tier
            if not tight and state.prompt_tokens >= blocked_tokens.get(barred, math.inf):
                continue
            if self._demoted(state):
                continue
            if self._try_send(state, passes=slots.passes(state)) is not None:
                if not self.fleet.any_room:
                    return
                if tight:
                    slots.leave(state)
                else:
                    blocked_tokens[barred] = state.prompt_tokens

    def _demoted(self, state: RequestState) -> bool:
        """Demote a late request, or refuse it, as its tier says; returns whether it was late."""
        if not self.waiting.demotes:
            return False
        fleet = self.fleet
        prefill_s = state.prompt_tokens * fleet.least_prefill_s_per_token
        first_token_s = fleet.ledger.first_token_s
        late = self.waiting.is_late(state, self.now_s, prefill_s, first_token_s)
        if late and state.refused_late:
            self.refuse(state, Refusal.SHED, retry_after_s=self.retry_after_s())
        elif late:
            self.waiting.demote(state)
            self.emit(do.Demote(state.number))
        return late

    def retry_after_s(self) -> int:
        """Whole seconds after which a refused client may retry."""
        return max(1, min(60, round(self.fleet.least_work_s)))

    def at_replica(self, number: int) -> tuple[RequestState, Placed] | None:
        """The request and its phase if it is at a replica, else ``None``."""
        state = self.requests.get(number)
        if state is None or not isinstance(state.phase, Placed):
            return None
        return state, state.phase

    def forward(self, state: RequestState, phase: Placed) -> None:
        """Forward the answer to the client, up to the booked output tokens."""
        if isinstance(phase, Sent):
            self.first_byte(state, phase.booking)
        state.phase = Streaming(phase.booking)
        credit = UNLIMITED_TOKENS
        if state.request is not None and state.forecast is not None:
            credit = state.request.output_tokens
        self.emit(do.Forward(state.number, credit))

    def first_byte(self, state: RequestState, booking: Booking) -> None:
        """The replica has computed the prompt, and may have room for another request."""
        if state.charge is not None:
            self.waiting.fair.begun(state.charge)
        if booking.entry is not None:
            booking.entry.first_byte(self.now_s)
            if self.waiting.demotes or state.tenant:
                self.may_settle()

    def served(self, replica: TableReplica) -> None:
        """Record a success; if it closes the breaker, waiting requests may go there."""
        if self.fleet.served(replica):
            self.may_settle()

    def failed(
        self,
        replica: TableReplica,
        reason: str,
        *,
        at_once: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        """Record a failure. If every breaker is open, all replicas get requests all the same."""
        self.fleet.failed(replica, self.now_s, reason, at_once=at_once, retry_after_s=retry_after_s)
        self.may_settle()

    def retry(self, state: RequestState, phase: Placed, reason: str, *, died: bool) -> bool:
        """Retry a request, whose client has nothing yet, on another replica if one may try."""
        name = phase.booking.replica.id
        if state.attempts >= self.policy.max_attempts:
            return False
        if not self.fleet.may_retry(state, name, died=died):
            return False
        self.emit(do.Retry(state.number, name, reason))
        self.release(state, phase, tried=True)
        state.phase = QUEUED
        self.enter(state)
        return True

    def refuse(
        self,
        state: RequestState,
        refusal: Refusal,
        *,
        reason: str = "",
        status: int = 0,
        retry_after_s: int = 0,
    ) -> None:
        """End a request with an error."""
        self.leave(state)
        self.emit(
            do.Refuse(
                number=state.number,
                refusal=refusal,
                replica=state.replica,
                reason=reason,
                status=status,
                retry_after_s=retry_after_s,
            )
        )
        finish = FinishStatus.FAILED
        if refusal in REJECTIONS:
            finish = FinishStatus.REJECTED
        elif refusal is Refusal.REFUSED_WITHOUT_BODY:
            finish = FinishStatus.CLIENT_ERROR
        self.end(state, finish)

    def leave(self, state: RequestState) -> None:
        """Release the replica, if the request is at one."""
        if isinstance(state.phase, Placed):
            self.emit(do.LetGo(state.number))
            self.release(state, state.phase, tried=False)

    def release(
        self, state: RequestState, phase: Placed, *, tried: bool, done: bool = False
    ) -> None:
        """Free the slot at a replica; ``tried``: never send the request there again."""
        booking = phase.booking
        self.fleet.unbook(booking, self.now_s, done=done)
        if booking.entry is not None:
            self.may_settle()
        if tried:
            state.tried.add(booking.start)

    def end(self, state: RequestState, status: FinishStatus) -> None:
        """End a request that has released its replica, and drop its state."""
        state.phase = Ended(status)
        # Somebody may have waited for its turn to pass.
        self._freed |= bool(state.tenant) and state in self.waiting
        self.waiting.discard(state)
        del self.requests[state.number]
        self.emit(
            do.Record(
                number=state.number,
                status=status,
                replica=state.replica,
                moves=state.moves,
                charge=state.charge,
                made_tokens=0 if state.charge is None else state.charge.made_tokens,
            )
        )
