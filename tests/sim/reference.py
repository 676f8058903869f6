"""The live request machine in front of iteration-level engines, on a virtual clock.

``control.dispatch`` decides what the gateway does, ``engine_reference`` what engines do. This file
only connects them: tokens become events, commands become queues of engines. The live gateway knows
neither roles nor live migration, so those streams' bookings are changed in its books directly.
"""

import math

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.fleet import Fleet as MachineFleet
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.order import engine_priority
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.router import Router
from oserve.control.dispatch.state import Booking, Streaming
from oserve.control.dispatch.table import EMPTY_TABLE, RoutingTable, TableReplica
from oserve.control.dispatch.witness import Witness
from oserve.core import Endpoint, FinishStatus, ReplicaPhase, Request, Tier
from sim.engine_reference import PS, Engine, Job, Transfer
from sim.peers import PeerRouter


class SteppedMachine(RequestMachine):
    """Hears the events of a moment one by one and then settles, as ``handle_all`` does with all."""

    def __init__(self, policy: DispatchPolicy) -> None:
        super().__init__(policy)
        self._heard: list[on.Event] = []
        self._asked: list[do.Command] = []

    def hear(self, event: on.Event, now_s: float) -> None:
        self._life.now_s = now_s
        self._life.commands = self._asked
        self._handlers[type(event)](event)
        self._heard.append(event)

    def settle(self, now_s: float) -> list[do.Command]:
        self._life.now_s = now_s
        self._life.commands = commands = self._asked
        self._life.settle()
        if self.observer is not None:
            self.observer(self._heard, commands)
        self._heard, self._asked = [], []
        return commands

    def rebook(self, number: int, target: str, request: Request, now_s: float) -> None:
        """A running stream is another replica's from now on; its own has room for another."""
        state = self.requests[number]
        assert isinstance(state.phase, Streaming)
        assert state.phase.booking.entry is not None
        state.phase.booking.entry.close(now_s, done=False)
        entry = self.fleet.ledger.admit(target, request, now_s)
        replica = next(item for item in self.table.replicas if item.id == target)
        state.phase = Streaming(Booking(replica, entry))
        state.replica = target
        self._life.may_settle()


UNLIMITED = DispatchPolicy(
    max_queued=10**6,
    max_attempts=10**6,
    max_moves=10**6,
    request_timeout_s=math.inf,
    no_replica_wait_s=math.inf,
    learns_speed=False,
)
_PHASES = {"ready": ReplicaPhase.READY, "draining": ReplicaPhase.DRAINING}
_ENDS = {
    do.Refusal.QUEUE_FULL: "refused",
    do.Refusal.SHED: "shed",
    do.Refusal.REPLICA_FAILED: "lost",
}


def route_by(fleet: MachineFleet, router: Router) -> None:
    """Have the machine route by another router than the live one."""
    follow = fleet.follow

    def followed(table: RoutingTable, now_s: float) -> None:
        follow(table, now_s)
        fleet._router = router

    fleet.follow = followed  # type: ignore[method-assign]


class Reference:
    """A fleet. ``policy``: pools (the live router), work, requests, turn, freeness.

    ``watched``: the machine's invariants are checked at every moment.
    """

    def __init__(
        self,
        jobs: list[Job],
        *,
        dispatch: DispatchPolicy = UNLIMITED,
        policy: str = "pools",
        shares: dict[int, dict[str, float]] | None = None,
        closed_loop: int = 0,
        tiers: tuple[Tier, ...] = (),
        watched: bool = True,
    ) -> None:
        self.tiers = tiers
        self.jobs = jobs
        self.engines: list[Engine] = []
        self.machine = SteppedMachine(dispatch)
        self.witness = Witness(self.machine) if watched else None
        self.peer = None if policy == "pools" else PeerRouter(policy, self.engines)
        if self.peer is not None:
            route_by(self.machine.fleet, self.peer)
        self.shares = {str(kind): row for kind, row in (shares or {}).items()}
        self.coming = list(jobs)
        self.held_back: list[Job] = []
        if closed_loop:
            self.coming, self.held_back = jobs[:closed_loop], jobs[closed_loop:]
        self.transfers: list[Transfer] = []
        self.now = 0
        # Whether anything was heard since the machine settled.
        self.heard = False

    # -- the machine ----------------------------------------------------------------------------
    def table(self) -> RoutingTable:
        return RoutingTable(
            plan_id="",
            length_classes=(),
            routing_shares=self.shares,
            replicas=tuple(
                TableReplica(
                    id=engine.name,
                    shape="",
                    # One that only decodes has books, but gets nothing from the gateway.
                    phase=_PHASES["draining" if engine.role == "decode" else engine.phase],
                    endpoint=Endpoint(url=""),
                    max_inflight=engine.max_inflight,
                    max_model_len=0,
                    accepts_priority=engine.ordered,
                    returns_token_ids=True,
                    prefill_s_per_token=engine.prefill_s,
                    decode_s_per_token=engine.decode_s,
                    precision=engine.precision,
                    devices=engine.stages,
                )
                for engine in self.engines
                if engine.phase in _PHASES
            ),
            tiers=self.tiers,
            default_tier=self.tiers[0].name if self.tiers else "",
        )

    def hear(self, event: on.Event) -> None:
        self.heard = True
        self.machine.hear(event, self.now / PS)

    def settle(self) -> None:
        """Do what the machine asks for after all that happened at this moment."""
        self.heard = False
        now_s = self.now / PS
        self.carry_out(self.machine.settle(now_s))
        if self.peer is not None:
            self.peer.routed.clear()
        due_s = self.machine.due_s
        if due_s < math.inf and round(due_s * PS) <= self.now:
            self.carry_out(self.machine.handle(on.Tick(), max(now_s, due_s)))
            assert self.machine.due_s > due_s

    def carry_out(self, commands: list[do.Command]) -> None:
        for command in commands:
            match command:
                case do.Send(number=number, replica=replica, rank_s=rank_s):
                    job = self.jobs[number]
                    job.priority = engine_priority(rank_s)
                    job.on, job.dispatched = replica.id, self.now
                    self.engine(replica.id).enqueue(job)
                case do.Refuse(number=number, refusal=refusal):
                    self.close(self.jobs[number], _ENDS[refusal])
                case do.Retry(number=number) | do.Resume(number=number):
                    job = self.jobs[number]
                    job.status, job.done, job.on = "queued", 0, ""
                    job.replays += 1
                case _:
                    pass

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.engines if engine.name == name)

    def close(self, job: Job, status: str) -> None:
        job.status, job.finish = status, self.now
        if self.held_back:
            following = self.held_back.pop(0)
            following.arrival = self.now
            self.coming.append(following)

    def arrive(self, job: Job) -> None:
        job.status = "queued"
        request = Request(
            id="",
            arrival_s=0.0,
            workload_type=str(job.kind),
            prompt_tokens=job.prompt,
            output_tokens=job.expected,
            promise=job.promise,
        )
        self.hear(
            on.Arrived(
                number=job.number,
                request=request,
                rank_s=job.rank / PS,
                streams=True,
                tenant=job.tenant,
            )
        )

    def lose(self, job: Job, *, again: bool = False) -> None:
        """Its replica does not have it any more; ``again``: that one may be asked again."""
        if job.made == 0:
            self.leave(job, on.Lost(number=job.number, reason="gone"))
            return
        rest = on.Rest(context_tokens=job.known, made_tokens=job.made)
        cause = on.Cause.DIVERGED if again else on.Cause.LOST
        self.leave(job, on.Broken(number=job.number, cause=cause, rest=rest, reason="gone"))

    def leave(self, job: Job, event: on.Event) -> None:
        """It leaves its replica; if it has ended, the gateway tells what it was worth."""
        charge = self.machine.requests[job.number].charge
        self.hear(event)
        if charge is not None and job.number not in self.machine.requests:
            self.machine.settle_charge(charge, max(0, job.made - charge.made_tokens))

    # -- what ends ------------------------------------------------------------------------------
    def emitted(self, engine: Engine, job: Job) -> None:
        job.made += 1
        was_fresh, job.fresh = job.fresh, False
        if job.first is None:
            job.first = self.now
            self.hear(on.Streams(job.number))
        elif was_fresh:
            self.hear(on.Began(job.number))
        if job.made == job.output:
            engine.running.remove(job)
            self.leave(job, on.Finished(job.number))
            if job.session >= 0:
                for other in self.engines:
                    other.held.pop(job.session, None)
                kept = engine.layout.tables * (job.done // engine.layout.size)
                if kept:
                    engine.held[job.session] = kept
            self.close(job, "completed")
            return
        target = None
        if was_fresh and engine.role == "prefill":
            target = self.heir(engine, job)
        elif job.leaving_to is not None and self.now >= job.leaving_at:
            target, job.leaving_to = job.leaving_to, None
            if target.phase != "ready":
                target, job.copied = None, 0
        if target is not None:
            self.depart(engine, target, job)

    def owed(self, name: str) -> tuple[int, int]:
        """Picoseconds of work and requests that a replica owes."""
        owed_s, inflight = self.machine.fleet.ledger.own().get(name, (0.0, 0))
        return round(owed_s * PS), inflight

    def heir(self, source: Engine, job: Job) -> Engine | None:
        able = [
            engine
            for engine in self.engines
            if engine is not source
            and engine.phase == "ready"
            and engine.role == "decode"
            and engine.layout.whole(job) <= engine.total_blocks
        ]
        return min(able, key=lambda e: self.owed(e.name)[0] + self.rest(job, e), default=None)

    def rest(self, job: Job, engine: Engine) -> int:
        return int(max(1, job.expected - job.made) * engine.decode_s * PS + 0.5)

    def depart(self, source: Engine, target: Engine, job: Job) -> None:
        source.running.remove(job)
        source.outgoing.append(job)
        begin = max(self.now, source.link_free)
        source.link_free = begin + (job.done - job.copied) * source.link_ps_per_token
        job.copied, job.status = 0, "moving"
        rest = Request(
            id="",
            arrival_s=0.0,
            workload_type=str(job.kind),
            prompt_tokens=0,
            output_tokens=max(1, job.expected - job.made),
        )
        self.machine.rebook(job.number, target.name, rest, self.now / PS)
        job.on = target.name
        self.transfers.append(Transfer(source.link_free + source.link_ps, job, source, target))

    def receive(self, transfer: Transfer) -> None:
        job, source, target = transfer.job, transfer.source, transfer.target
        if source is not None:
            source.outgoing.remove(job)
            source.wants_step = True
        if source is None or target.phase == "gone":
            self.lose(job, again=True)
        else:
            target.enqueue(job)

    # -- what a caller may do -------------------------------------------------------------------
    def drain(self, engine: Engine) -> None:
        if engine.phase in {"loading", "ready"}:
            engine.phase = "draining"
            self.hear(on.TableChanged(self.table()))

    def hang(self, engine: Engine) -> None:
        engine.hangs = True

    def remove(self, engine: Engine, *, replay: bool) -> None:
        engine.phase = "gone"
        self.hear(on.TableChanged(self.table()))
        # Tenants begin to wait again in this order.
        for job in engine.running + engine.waiting:
            job.leaving_to, job.copied = None, 0
            if replay:
                self.lose(job)
            else:
                self.leave(job, on.Finished(job.number, FinishStatus.FAILED))
                self.close(job, "lost")
        engine.running, engine.waiting, engine.batches = [], [], []
        engine.outgoing = []
        engine.held.clear()
        for transfer in self.transfers:
            if transfer.source is engine:
                transfer.source = None

    def migrate(self, job: Job, target: Engine) -> bool:
        source = next((e for e in self.engines if job in e.running), None)
        if source is None or source is target or target.phase != "ready":
            return False
        if job.fresh or job.leaving_to or target.layout.whole(job) > target.total_blocks:
            return False
        job.leaving_to, job.copied = target, job.done
        begin = max(self.now, source.link_free)
        source.link_free = begin + job.done * source.link_ps_per_token
        job.leaving_at = source.link_free
        return True

    # -- time -----------------------------------------------------------------------------------
    def moments(self) -> list[int]:
        found = [job.arrival for job in self.coming[:1]]
        found += [transfer.due for transfer in self.transfers]
        if self.machine.due_s < math.inf:
            found.append(round(self.machine.due_s * PS))
        for engine in self.engines:
            if engine.hangs or engine.phase == "gone":
                continue
            found += [batch.end for batch in engine.batches[:1]]
            if engine.phase == "loading":
                found.append(engine.ready_at)
            waits = engine.wants_step and len(engine.batches) < engine.stages
            if waits and (engine.running or engine.waiting):
                found.append(max(self.now, engine.stage_free[0]))
        return found

    def begin_steps(self) -> None:
        for engine in self.engines:
            if engine.may_begin(self.now):
                engine.begin(self.now)

    def advance(self, until: int) -> None:
        if self.machine.table is EMPTY_TABLE:
            self.hear(on.TableChanged(self.table()))
        if self.heard:
            self.settle()
            self.begin_steps()
        while (moment := min(self.moments(), default=until + 1)) <= until:
            self.now = max(self.now, moment)
            self.end_steps()
            due = [t for t in self.transfers if t.due == self.now]
            for transfer in sorted(due, key=lambda item: item.job.number):
                self.transfers.remove(transfer)
                self.receive(transfer)
            while self.coming and self.coming[0].arrival <= self.now:
                self.arrive(self.coming.pop(0))
            self.settle()
            self.begin_steps()
        self.now = max(self.now, until)

    def end_steps(self) -> None:
        for engine in self.engines:
            if engine.phase == "loading" and engine.ready_at <= self.now and not engine.hangs:
                engine.phase = "ready"
                self.hear(on.TableChanged(self.table()))
        for engine in self.engines:
            if engine.batches and engine.batches[0].end == self.now and not engine.hangs:
                batch = engine.batches.pop(0)
                engine.wants_step = True
                for job in batch.emitting:
                    self.emitted(engine, job)
