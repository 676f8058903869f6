"""What random worlds around the request machine are made of, and tables, requests for all tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.events import Arrived
from oserve.control.dispatch.policy import DispatchPolicy, DrainDecision, all_leave
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, PlannedType, Promise, ReplicaPhase, Request, Tier

# A moment is a multiple of this, so that many events fall together.
STEP_S = 0.125

# What a replica does with a request that it is sent.
ANSWERS = ("answer",)
BREAKS = ("break", "trouble", "diverge")
FAULTS = (
    *BREAKS,
    "refuse 500",
    "refuse 429",
    "refuse 400",
    "refuse 401",
    "abort",
    "unreachable",
    "break at once",
    "unheard",
    "hang",
    "reword",
    "crash",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A forecast of an answer's length."""

    tokens: float

    def beyond(self, made_tokens: float) -> float:
        return max(self.tokens, 1.5 * made_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a client asks, ``at`` which step. ``guess``: of its output; ``None``: it is known.

    ``kind``: stream, whole, long (the client sees it come) or auxiliary. ``leaves``: steps after
    which the client goes. ``hidden``: what keeps it from moving shows only when it is to move.
    """

    at: int = 0
    prompt: int = 10
    output: int = 3
    guess: int | None = None
    kind: str = "stream"
    movable: bool = True
    hidden: bool = False
    leaves: int | None = None
    session: str = ""
    tier: Tier | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to the fleet.

    gone, again, drain, vacate, elsewhere, expected, unexpected, or tune: other constants.
    """

    at: int
    what: str
    replica: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fake:
    """A replica: its limits, steps to the first token and to each further one, what it does."""

    most: int = 2
    context: int = 0
    first: int = 1
    each: int = 1
    resumes: bool = True
    attached: bool = False
    script: tuple[str, ...] = ANSWERS
    precision: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that happens. ``together``: events of a moment are told in one call.

    ``reading``: steps that it takes to read a stream which is to leave its replica.
    """

    fakes: tuple[Fake, ...]
    asks: tuple[Ask, ...]
    changes: tuple[Change, ...] = ()
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    drain: DrainDecision = all_leave
    together: bool = True
    reading: int = 0
    tiers: tuple[Tier, ...] = ()


def replica_of(
    name: str,
    fake: Fake | None = None,
    *,
    phase: ReplicaPhase = ReplicaPhase.READY,
    started_s: float = 0.0,
) -> TableReplica:
    """As the routing table has it: 10 ms a token of a prompt, 100 ms a token of an answer."""
    fake = fake or Fake()
    return TableReplica(
        id=name,
        shape="s",
        phase=phase,
        endpoint=Endpoint(url="x"),
        max_inflight=fake.most,
        max_model_len=fake.context,
        accepts_priority=True,
        returns_token_ids=fake.resumes,
        prefill_s_per_token=0.01,
        decode_s_per_token=0.1,
        attached=fake.attached,
        started_s=started_s,
        precision=fake.precision,
    )


def table_of(
    replicas: Sequence[TableReplica],
    *,
    expected: bool = True,
    constants: DispatchConstants | None = None,
    tiers: tuple[Tier, ...] = (),
) -> RoutingTable:
    """Most requests are for the first replica, some for the second, none for the others."""
    return RoutingTable(
        plan_id="p",
        length_classes=(),
        routing_shares={"t": {"r0": 0.7, "r1": 0.3}},
        replicas=tuple(replicas),
        expected=expected,
        constants=constants,
        tiers=tiers,
        default_tier=tiers[0].name if tiers else "",
        planned_types=tuple(
            PlannedType(
                name=tier.name,
                prompt_tokens=10,
                output_tokens=3,
                shares={f"r{index}": 1.0},
                tier=tier.name,
            )
            for index, tier in enumerate(tiers)
        ),
    )


def arrival(number: int, now_s: float = 0.0, ask: Ask | None = None) -> Arrived:
    """A client's request; a prompt's token counts in its rank as a twentieth of a second."""
    ask = ask or Ask()
    if ask.kind == "auxiliary":
        return Arrived(number=number, request=None)
    return Arrived(
        number=number,
        request=Request(
            id=str(number),
            arrival_s=now_s,
            workload_type="t",
            prompt_tokens=ask.prompt,
            output_tokens=ask.output if ask.guess is None else ask.guess,
            promise=None if ask.tier is None else Promise.of(ask.tier),
        ),
        rank_s=now_s + ask.prompt / 20,
        streams=ask.kind == "stream",
        session=ask.session,
        forecast=None if ask.guess is None else Guess(tokens=float(ask.guess)),
    )
