"""An engine, iteration by iteration and object by object: slow, but easy to read.

It shares no code with the kernel. Where the kernel skips many steps in closed form, this takes each
of them; both count whole picoseconds, so all moments must be equal to the last bit.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from oserve.core import Promise

PS: Final = 10**12
BLOCK: Final = 16


def blocks(tokens: int, size: int = BLOCK) -> int:
    return math.ceil(tokens / size)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a sequence takes blocks: by tokens in tables, whole windows, and states."""

    size: int = BLOCK
    tables: int = 1
    states: int = 0
    windows: int = 0
    window: int = 0
    window_size: int = BLOCK

    def grown(self, tokens: int) -> int:
        return self.tables * blocks(tokens, self.size)

    def beside(self, job: "Job") -> int:
        seen = min(self.window, job.prompt + job.output)
        return self.states + self.windows * blocks(seen, self.window_size)

    def whole(self, job: "Job") -> int:
        return self.grown(job.prompt + job.output) + self.beside(job)


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
    tenant: str = ""
    promise: Promise | None = None
    made: int = 0
    done: int = 0
    status: str = "pending"
    first: int | None = None
    finish: int | None = None
    preemptions: int = 0
    replays: int = 0
    reused: int = 0
    fresh: bool = True
    on: str = ""
    dispatched: int | None = None
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
    precision: str = ""
    role: str = "both"
    ordered: bool = False
    max_inflight: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    link_ps: int = 0
    link_ps_per_token: int = 0
    ready_at: int = 0
    phase: str = "loading"
    hangs: bool = False
    layout: Layout = Layout()

    def __post_init__(self) -> None:
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.held: OrderedDict[int, int] = OrderedDict()
        self.outgoing: list[Job] = []
        self.batches: list[Batch] = []
        self.stage_free = [0] * self.stages
        self.link_free = 0
        self.busy = 0
        self.wants_step = False

    # -- blocks ---------------------------------------------------------------------------------
    @property
    def used(self) -> int:
        return sum(
            self.layout.grown(job.done) + self.layout.beside(job)
            for job in self.running + self.outgoing
        )

    @property
    def free(self) -> int:
        """Including what only ended sessions hold."""
        return self.total_blocks - self.used

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
            extra = self.layout.grown(job.done + chunk) - self.layout.grown(job.done)
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
            if self.layout.grown(job.known) + self.layout.beside(job) > self.free:
                break
            self.waiting.pop(0)
            if job.done == 0 and job.session in self.held:
                size = self.layout.size
                held = self.held.pop(job.session) // self.layout.tables
                cached = min(held, (job.known - 1) // size) * size
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
            and not self.hangs
            and self.wants_step
            and len(self.batches) < self.stages
            and self.stage_free[0] <= now
            and bool(self.running or self.waiting)
        )
