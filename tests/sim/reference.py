"""The simulator's semantics once more, step by step and object by object: slow, but easy to read.

Shares no code with the kernel. Where the kernel skips many steps in closed form, this takes each of
them; both count whole picoseconds, so all moments must be equal to the last bit.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from oserve.control.dispatch.router import NoRoute, Router
from oserve.core import ReplicaLoad, Request

PS: Final = 10**12
BLOCK: Final = 16


def blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK)


@dataclass(eq=False, kw_only=True)
class Job:
    """A request. ``known`` tokens are its prompt and what it has emitted; ``done`` have KV."""

    number: int
    arrival: int
    prompt: int
    output: int
    expected: int
    kind: int = 0
    rank: int = 0
    priority: int = 0
    session: int = -1
    demote_at: float = math.inf
    shed_at: float = math.inf
    made: int = 0
    done: int = 0
    late: bool = False
    status: str = "pending"
    first: int | None = None
    finish: int | None = None
    preemptions: int = 0
    replays: int = 0
    reused: int = 0
    batch: object = None
    fresh: bool = True
    booked: int = 0
    booked_prompt: int = 0
    leaving_to: "Engine | None" = None
    leaving_at: int = 0
    copied: int = 0

    @property
    def known(self) -> int:
        return self.prompt + self.made


@dataclass(eq=False)
class Batch:
    """A step on its way: who emits a token when it ends."""

    end: int
    emitting: list[Job] = field(default_factory=list)


@dataclass(eq=False)
class Transfer:
    due: int
    job: Job
    source: "Engine | None"
    target: "Engine"


@dataclass(eq=False, kw_only=True)
class Engine:
    """One replica."""

    name: str
    prompts: Sequence[int]
    joint: Sequence[int]
    decodes: Sequence[int]
    kv_rate: int
    pair_rate: int
    seqs: int
    budget: int
    total_blocks: int
    stages: int = 1
    role: str = "both"
    ordered: bool = False
    max_inflight: int = 0
    max_prompt: float = math.inf
    prefill_s: float = 0.0
    decode_s: float = 0.0
    link_ps: int = 0
    link_ps_per_token: int = 0
    ready_at: int = 0
    phase: str = "loading"

    def __post_init__(self) -> None:
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.held: OrderedDict[int, int] = OrderedDict()
        self.outgoing: list[Job] = []
        self.batches: list[Batch] = []
        self.stage_free = [0] * self.stages
        self.owed = 0
        self.owed_prompt = 0
        self.inflight = 0
        self.link_free = 0
        self.busy = 0
        self.wants_step = False

    # -- blocks ---------------------------------------------------------------------------------
    @property
    def used(self) -> int:
        return sum(blocks(job.done) for job in self.running + self.outgoing)

    @property
    def free(self) -> int:
        """Including what only ended sessions hold."""
        return self.total_blocks - self.used

    @property
    def inflight_limit(self) -> int:
        return 0 if self.owed_prompt >= self.max_prompt else self.max_inflight

    def evict(self) -> None:
        """Old sessions make room for requests."""
        while sum(self.held.values()) > self.free:
            session = next(iter(self.held))
            self.held[session] -= 1
            if self.held[session] == 0:
                del self.held[session]

    # -- queue ----------------------------------------------------------------------------------
    def enqueue(self, job: Job, *, front: bool = False) -> None:
        job.status = "waiting"
        self.waiting.insert(0 if front else len(self.waiting), job)
        if self.ordered:
            self.waiting.sort(key=lambda item: (item.priority, item.number))
        self.wants_step = True

    def preempt(self, job: Job) -> None:
        self.running.remove(job)
        for batch in self.batches:
            if job in batch.emitting:
                batch.emitting.remove(job)
        job.done = job.copied = 0
        job.leaving_to = None
        job.preemptions += 1
        self.enqueue(job, front=True)

    # -- one step -------------------------------------------------------------------------------
    def schedule(self) -> tuple[dict[Job, int], bool]:
        """Tokens for each sequence in the next step, and whether somebody was thrown out."""
        budget = self.budget
        chunks: dict[Job, int] = {}
        thrown_out = False
        for job in list(self.running):
            if job not in self.running:
                continue
            chunk = min(job.known - job.done, budget)
            extra = blocks(job.done + chunk) - blocks(job.done)
            while extra > self.free and job in self.running:
                victim = self.running[-1]
                if self.ordered:
                    victim = max(self.running, key=lambda item: (item.priority, item.number))
                budget += chunks.pop(victim, 0)
                self.preempt(victim)
                thrown_out = True
            if job not in self.running:
                break
            if chunk > 0:
                chunks[job] = chunk
                job.done += chunk
                budget -= chunk
                self.evict()
        while not thrown_out and self.waiting and budget > 0 and len(self.running) < self.seqs:
            job = self.waiting[0]
            if blocks(job.known) > self.free:
                break
            self.waiting.pop(0)
            if job.done == 0 and job.session in self.held:
                cached = min(self.held.pop(job.session) * BLOCK, (job.known - 1) // BLOCK * BLOCK)
                job.done += cached
                job.reused += cached
            chunks[job] = min(job.known - job.done, budget)
            job.done += chunks[job]
            budget -= chunks[job]
            job.status, job.fresh = "running", True
            self.running.append(job)
            self.evict()
        return chunks, thrown_out

    def begin(self, now: int) -> None:
        self.wants_step = False
        chunks, thrown_out = self.schedule()
        while not chunks and thrown_out:
            chunks, thrown_out = self.schedule()
        self.wants_step = False
        if not chunks:
            return
        decoding = [job for job, chunk in chunks.items() if chunk == 1 and job.done == job.known]
        prompting = {job: chunk for job, chunk in chunks.items() if job not in decoding}
        tokens = sum(prompting.values())
        pairs = sum(sum(range(j.done - c + 1, j.done + 1)) for j, c in prompting.items())
        if tokens:
            whole = self.prompts[tokens + len(decoding)] + self.joint[len(decoding)]
        else:
            whole = self.decodes[len(decoding)]
        whole += self.kv_rate * sum(job.known for job in decoding) + self.pair_rate * pairs // 1024
        moment, share = now, whole // self.stages
        for stage in range(self.stages):
            moment = max(moment, self.stage_free[stage]) + share
            self.stage_free[stage] = moment
        self.busy += share
        batch = Batch(moment, [job for job in chunks if job.done == job.known])
        # In order of admission, whoever was admitted first.
        batch.emitting.sort(key=self.running.index)
        self.batches.append(batch)
        self.wants_step = len(self.batches) < self.stages

    def may_begin(self, now: int) -> bool:
        return (
            self.phase in {"ready", "draining"}
            and self.wants_step
            and len(self.batches) < self.stages
            and self.stage_free[0] <= now
            and bool(self.running or self.waiting)
        )


class Reference:
    """A fleet. ``policy``: pools (by the live router), work, requests, turn, freeness."""

    def __init__(
        self,
        jobs: list[Job],
        *,
        policy: str = "pools",
        shares: dict[int, dict[str, float]] | None = None,
        overflow_s: float = 2.0,
        max_queued: int = 10**6,
        closed_loop: int = 0,
    ) -> None:
        self.jobs = jobs
        self.engines: list[Engine] = []
        self.policy = policy
        self.router = Router({str(k): v for k, v in (shares or {}).items()}, overflow_s=overflow_s)
        self.max_queued = max_queued
        self.closed_loop = closed_loop
        self.coming = list(jobs)
        if closed_loop:
            self.coming, self.held_back = jobs[:closed_loop], jobs[closed_loop:]
        self.queue: list[Job] = []
        self.transfers: list[Transfer] = []
        self.turn = 0
        self.now = 0
        self.changed = True

    # -- who serves -----------------------------------------------------------------------------
    def loads(self, job: Job) -> dict[str, ReplicaLoad]:
        return {
            engine.name: ReplicaLoad(
                replica=engine.name,
                work_s=engine.owed / PS,
                inflight=engine.inflight,
                max_inflight=engine.inflight_limit,
                prefill_s_per_token=engine.prefill_s,
                decode_s_per_token=engine.decode_s,
            )
            for engine in self.engines
            if engine.phase == "ready"
            and engine.role != "decode"
            and blocks(job.prompt + job.output) <= engine.total_blocks
        }

    def choose(self, job: Job) -> Engine | None:
        loads = self.loads(job)
        by_name = {engine.name: engine for engine in self.engines}
        request = Request(
            id="",
            arrival_s=0.0,
            workload_type=str(job.kind),
            prompt_tokens=job.known,
            output_tokens=max(1, job.expected - job.made),
        )
        if self.policy == "pools":
            route = self.router.pick(request, loads)
            return None if isinstance(route, NoRoute) else by_name[route.replica]
        free = [by_name[n] for n, load in loads.items() if load.inflight < load.max_inflight]
        if not free:
            return None
        if self.policy == "turn":
            count = len(self.engines)
            chosen = min(free, key=lambda e: (self.engines.index(e) - self.turn) % count)
            self.turn = (self.engines.index(chosen) + 1) % count
            return chosen
        measures: dict[str, Callable[[Engine], float]] = {
            "requests": lambda e: e.inflight,
            "work": lambda e: e.owed / PS + self.own_s(job, e),
            "freeness": lambda e: (
                -(e.free - sum(blocks(w.known) for w in e.waiting)) / max(1, len(e.running))
            ),
        }
        return min(free, key=measures[self.policy])

    def own_s(self, job: Job, engine: Engine) -> float:
        left = max(1, job.expected - job.made)
        return job.known * engine.prefill_s + left * engine.decode_s

    def hopeless(self, job: Job) -> bool:
        able = [e for e in self.engines if e.phase != "gone" and e.role != "decode"]
        need = blocks(job.prompt + job.output)
        return bool(able) and all(need > engine.total_blocks for engine in able)

    def book(self, engine: Engine, job: Job, prompt: int, whole: int) -> None:
        job.booked, job.booked_prompt = whole, prompt
        engine.owed += whole
        engine.owed_prompt += prompt
        engine.inflight += 1

    def unbook(self, engine: Engine, job: Job) -> None:
        engine.owed -= job.booked
        engine.owed_prompt -= job.booked_prompt
        engine.inflight -= 1

    def close(self, job: Job, status: str) -> None:
        job.status, job.finish = status, self.now
        if self.closed_loop and self.held_back:
            following = self.held_back.pop(0)
            following.arrival = self.now
            following.demote_at += self.now
            self.coming.append(following)

    def expire(self) -> None:
        """Whoever is late goes behind; who is too late goes."""
        for job in [j for j in self.queue if j.late and self.now > j.shed_at]:
            self.queue.remove(job)
            self.close(job, "shed")
            job.finish = int(job.shed_at)

    def dispatch(self) -> None:
        while True:
            self.expire()
            self.queue.sort(
                key=lambda j: (1, j.arrival, j.number) if j.late else (0, j.rank, j.number)
            )
            if not self.queue:
                return
            job = self.queue[0]
            if self.now > job.demote_at and not job.late:
                job.late = True
                job.priority += 1 << 52
                continue
            if self.now > job.shed_at:
                self.queue.remove(job)
                self.close(job, "shed")
                job.finish = int(job.shed_at)
                continue
            engine = self.choose(job)
            if engine is None and self.hopeless(job) and not self.loads(job):
                self.queue.remove(job)
                self.close(job, "refused")
                continue
            if engine is None:
                return
            self.queue.remove(job)
            whole = int(self.own_s(job, engine) * PS + 0.5)
            self.book(engine, job, min(whole, int(job.known * engine.prefill_s * PS + 0.5)), whole)
            engine.enqueue(job)

    # -- what ends ------------------------------------------------------------------------------
    def emitted(self, engine: Engine, job: Job) -> None:
        job.made += 1
        was_fresh = job.fresh
        if job.fresh:
            job.first = self.now if job.first is None else job.first
            engine.owed -= job.booked_prompt
            engine.owed_prompt -= job.booked_prompt
            job.booked -= job.booked_prompt
            job.booked_prompt, job.fresh = 0, False
        if job.made == job.output:
            engine.running.remove(job)
            self.unbook(engine, job)
            if job.session >= 0:
                for other in self.engines:
                    other.held.pop(job.session, None)
                if job.done // BLOCK:
                    engine.held[job.session] = job.done // BLOCK
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

    def heir(self, source: Engine, job: Job) -> Engine | None:
        able = [
            engine
            for engine in self.engines
            if engine is not source
            and engine.phase == "ready"
            and engine.role == "decode"
            and blocks(job.prompt + job.output) <= engine.total_blocks
        ]
        return min(able, key=lambda e: e.owed + self.rest(job, e), default=None)

    def rest(self, job: Job, engine: Engine) -> int:
        return int(max(1, job.expected - job.made) * engine.decode_s * PS + 0.5)

    def depart(self, source: Engine, target: Engine, job: Job) -> None:
        source.running.remove(job)
        source.outgoing.append(job)
        begin = max(self.now, source.link_free)
        source.link_free = begin + (job.done - job.copied) * source.link_ps_per_token
        job.copied, job.status = 0, "moving"
        self.unbook(source, job)
        self.book(target, job, 0, self.rest(job, target))
        self.transfers.append(Transfer(source.link_free + source.link_ps, job, source, target))

    def arrive(self, transfer: Transfer) -> None:
        job, source, target = transfer.job, transfer.source, transfer.target
        if source is not None:
            source.outgoing.remove(job)
            source.wants_step = True
        if source is None or target.phase == "gone":
            self.unbook(target, job)
            self.replay(job)
        else:
            target.enqueue(job)

    def replay(self, job: Job) -> None:
        job.status, job.done = "queued", 0
        job.replays += 1
        self.queue.append(job)

    # -- what a caller may do -------------------------------------------------------------------
    def remove(self, engine: Engine, *, replay: bool) -> None:
        engine.phase, self.changed = "gone", True
        for job in engine.running + engine.waiting:
            self.unbook(engine, job)
            job.leaving_to, job.copied = None, 0
            if replay:
                self.replay(job)
            else:
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
        if job.fresh or job.leaving_to or blocks(job.prompt + job.output) > target.total_blocks:
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
        for engine in self.engines:
            found += [batch.end for batch in engine.batches[:1]]
            if engine.phase == "loading":
                found.append(engine.ready_at)
            waits = engine.wants_step and len(engine.batches) < engine.stages
            if waits and (engine.running or engine.waiting) and engine.phase != "gone":
                found.append(max(self.now, engine.stage_free[0]))
        return found

    def settle(self) -> None:
        """Hand over what can be, and begin steps."""
        self.dispatch()
        for engine in self.engines:
            if engine.may_begin(self.now):
                engine.begin(self.now)

    def advance(self, until: int) -> None:
        if self.changed:
            self.changed = False
            self.settle()
        while (moment := min(self.moments(), default=until + 1)) <= until:
            self.now = max(self.now, moment)
            for engine in self.engines:
                if engine.phase == "loading" and engine.ready_at <= self.now:
                    engine.phase = "ready"
            for engine in self.engines:
                if engine.batches and engine.batches[0].end == self.now:
                    batch = engine.batches.pop(0)
                    engine.wants_step = True
                    for job in batch.emitting:
                        self.emitted(engine, job)
            due = [t for t in self.transfers if t.due == self.now]
            for transfer in sorted(due, key=lambda item: item.job.number):
                self.transfers.remove(transfer)
                self.arrive(transfer)
            while self.coming and self.coming[0].arrival <= self.now:
                job = self.coming.pop(0)
                job.status = "queued"
                self.queue.append(job)
                self.dispatch()
                if len(self.queue) > self.max_queued and job.status == "queued":
                    self.queue.remove(job)
                    self.close(job, "refused")
            self.settle()
        self.now = max(self.now, until)
