"""Every policy by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from oserve.core import Objective, OServeError
from oserve.evaluate.simulator import Levers, Routing, SimulatedServing
from oserve.study import peers
from oserve.study.controller_policy import controller_policy
from oserve.study.ours import OServeTuner
from oserve.study.policy import Conduct, Fixed, Policy, PolicyStart
from oserve.study.switching import Oracle, Reload, Switching

# Over how long a switch must pay, in seconds, and the devices it may take away at once.
HORIZON_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """``make`` searches the policy's settings for a scene; ``words`` say what it is."""

    words: str
    make: Callable[[OServeTuner], Policy]


def _static(pick: Callable[[OServeTuner], SimulatedServing]) -> Callable[[OServeTuner], Policy]:
    return lambda tuner: Fixed(serving=pick(tuner))


def _in_turn(serving: SimulatedServing) -> SimulatedServing:
    return replace(serving, levers=Levers(routing=Routing.ROUND_ROBIN))


def _reload(tuner: OServeTuner) -> Policy:
    return Reload(tuner=tuner, serving=tuner.best_chunk.serving)


def _library(tuner: OServeTuner) -> list[SimulatedServing]:
    """Deployments that did well: those of all searches, and the programme's best mixtures."""
    found = [tuner.everything, tuner.best_tuned, tuner.best_chunk]
    servings = [item.serving for item in found]
    servings += tuner.heterogeneous(tuner.everything.serving.levers)[:2]
    distinct: dict[str, SimulatedServing] = {}
    for serving in servings:
        distinct.setdefault(repr(serving.shapes), serving)
    return list(distinct.values())


def _oserve(tuner: OServeTuner) -> Policy:
    return Switching(
        tuner=tuner,
        serving=tuner.everything.serving,
        library=_library(tuner),
        horizon_s=HORIZON_S,
        conduct=Conduct(decides=True),
    )


def _oracle(tuner: OServeTuner) -> Policy:
    return Oracle(tuner=tuner, serving=tuner.knowing.serving, library=_library(tuner))


def _following(
    objective: Objective, start: PolicyStart = PolicyStart.TRANSFER, *, mixed: bool = True
) -> Callable[[OServeTuner], Policy]:
    return lambda tuner: controller_policy(tuner, start=start, objective=objective, mixed=mixed)


POLICIES: Mapping[str, Entry] = {
    "static-default": Entry(
        words="smallest TP with KV room, chunk 2048, 256 sequences, shortest queue, FCFS",
        make=_static(lambda tuner: tuner.default),
    ),
    "static-default-rr": Entry(
        words="static-default with round robin",
        make=_static(lambda tuner: _in_turn(tuner.default)),
    ),
    "static-best": Entry(
        words="best TP x PP x sequences in hindsight, chunk 2048, shortest queue, FCFS",
        make=_static(lambda tuner: tuner.best.serving),
    ),
    "static-best-rr": Entry(
        words="static-best with round robin",
        make=_static(lambda tuner: _in_turn(tuner.best.serving)),
    ),
    "static-best-chunk": Entry(
        words="best TP x PP x sequences x chunk budget in hindsight, shortest queue, FCFS",
        make=_static(lambda tuner: tuner.best_chunk.serving),
    ),
    "static-best-tuned": Entry(
        words="static-best-chunk with requests ordered by prompt length, all tuned in hindsight",
        make=_static(lambda tuner: tuner.best_tuned.serving),
    ),
    "static-latency": Entry(
        words="least P99 E2E of the homogeneous deployments that hold the SLO at the peak, chunk "
        "budget and order tuned in hindsight",
        make=_static(lambda tuner: tuner.latency),
    ),
    "reload": Entry(
        words="best homogeneous for last-value rates each interval, cold reload", make=_reload
    ),
    "llumnix": Entry(words="freeness dispatch, live migration", make=peers.llumnix),
    "dynamo": Entry(words="replica count by forecast of means, cold starts", make=peers.dynamo),
    "aibrix": Entry(words="replicas per length class, re-balanced", make=peers.aibrix),
    "llmd": Entry(words="least predicted latency, output-length buckets", make=peers.llmd),
    "oserve-shapes": Entry(
        words="different shapes where the simulator confirms them, shortest queue, FCFS",
        make=_static(lambda tuner: tuner.shapes_only.serving),
    ),
    "oserve-assign": Entry(
        words="oserve-shapes with assignment to soft pools and overflow",
        make=_static(lambda tuner: tuner.assigned.serving),
    ),
    "oserve-static": Entry(
        words="all levers: shapes, chunk, order, pools, late choice, demotion; no switching",
        make=_static(lambda tuner: tuner.everything.serving),
    ),
    "oserve": Entry(
        words="oserve-static with the live controller: least latency within the SLO, weights moved",
        make=_following(Objective.LATENCY),
    ),
    "oserve-homogeneous": Entry(
        words="oserve without deployments of two shapes",
        make=_following(Objective.LATENCY, mixed=False),
    ),
    "oserve-energy": Entry(
        words="the same with the objective energy", make=_following(Objective.ENERGY)
    ),
    "oserve-capacity": Entry(
        words="the same with the objective capacity", make=_following(Objective.CAPACITY)
    ),
    "oserve-reload": Entry(
        words="oserve-static with the live controller, cold starts",
        make=_following(Objective.LATENCY, start=PolicyStart.COLD),
    ),
    "oserve-last-value": Entry(
        words="oserve-static, re-planned for last-value rates", make=_oserve
    ),
    "oracle": Entry(
        words="knows the coming interval and output lengths, switches free", make=_oracle
    ),
}

BASE = "static-default"

STATIC = (
    *(name for name in POLICIES if name.startswith("static")),
    *("oserve-shapes", "oserve-assign", "oserve-static"),
)
"""Policies that never switch, the only ones that know service tiers."""


def policy_names(text: str) -> list[str]:
    """Names from ``a,b,c`` or ``all``; raises OServeError for an unknown one."""
    if text == "all":
        return list(POLICIES)
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise OServeError(
            f"there is no policy {unknown[0]!r}" if unknown else "no policy is named",
            place="--policies",
            remedy="use some of: " + ", ".join(POLICIES) + ", or all",
        )
    return names
