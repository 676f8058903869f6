"""Records of the controller's decisions: the forecast, the scores, the verdict and its reason.

Dashboard, log, tests and replay read the same record. Rates are requests/s, amounts requests.
"""

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """``off``: only count. ``advise``: decide and report. ``auto``: decide and switch."""

    OFF = "off"
    ADVISE = "advise"
    AUTO = "auto"


class Trigger(StrEnum):
    """What caused a decision."""

    INTERVAL = "interval"
    CHANGE = "change"
    MANUAL = "manual"
    QUESTION = "question"
    LOAD = "load"
    NODE = "node"


class DecisionVerdict(StrEnum):
    """The outcome of a decision. ``advise``: a switch would pay, but the mode forbids it."""

    KEEP = "keep"
    ADVISE = "advise"
    SWITCH = "switch"


class Reason(StrEnum):
    """Why. The reasons up to ``held`` (by an operator) keep the plan, whatever others gain."""

    NO_DATA = "no_data"
    NO_PLAN = "no_plan"
    SAME_PLAN = "same_plan"
    SWITCH_UNDER_WAY = "switch_under_way"
    MINIMUM_DWELL = "minimum_dwell"
    SWITCH_LIMIT = "switch_limit"
    HELD = "held"
    BELOW_PRESENT_NEED = "below_present_need"
    GAIN_TOO_SMALL = "gain_too_small"
    COST_EXCEEDS_GAIN = "cost_exceeds_gain"
    NOT_LONG_ENOUGH = "not_long_enough"
    GAIN_EXCEEDS_COST = "gain_exceeds_cost"
    ZERO_TRAFFIC = "zero_traffic"
    MANUAL = "manual"
    NO_LADDER = "no_ladder"
    OVERLOADED = "overloaded"
    LOAD_RISES = "load_rises"
    OBJECTIVE_GAINS = "objective_gains"
    NODES_CHANGED = "nodes_changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeForecast:
    """The forecast of one type for the next interval, in requests/s.

    ``low_rps`` and ``high_rps`` are the 0.05 and 0.95 quantiles.
    """

    name: str
    now_rps: float
    expected_rps: float
    low_rps: float
    high_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderPlace:
    """The place on the ladder that a decision is based on; see ``control.following``.

    Loads are multiples of the largest load that a deployment holds. Costs are per request, 1.0 the
    best that a deployment reaches at the expected load; ``gain_per_s``, ``regret`` and ``price``
    count requests at the best latency (or energy).
    """

    load: float
    expected_load: float
    required_load: float
    rung: str
    current_cost: float
    candidate_cost: float
    gain_per_s: float
    regret: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision. ``at_s`` is Unix time.

    ``current_rps`` and ``candidate_rps``: served within limits, averaged over the ``lasts_s``
    seconds for which the candidate is expected to stay the best. ``gain_requests``: what the
    candidate serves more in that time, without the time of the switch. ``lost_requests``: what is
    served less during the switch. ``touched_requests`` run on replicas that change. The cost is all
    lost and part of the touched requests. ``pays_after_s``: when the gain has made up for the cost,
    if ever. ``missed_requests``: the switch regret so far.
    """

    number: int
    at_s: float
    trigger: Trigger
    verdict: DecisionVerdict
    reason: Reason
    current_plan: str
    candidate_plan: str = ""
    forecast: tuple[TypeForecast, ...] = ()
    lasts_s: float = 0.0
    current_rps: float = 0.0
    candidate_rps: float = 0.0
    gain_requests: float = 0.0
    cost_requests: float = 0.0
    switch_s: float = 0.0
    lost_requests: float = 0.0
    touched_requests: float = 0.0
    changed_replicas: int = 0
    pays_after_s: float | None = None
    missed_requests: float = 0.0
    detail: str = ""
    place: LadderPlace | None = None

    @property
    def line(self) -> str:
        """One line for the log."""
        rates = ", ".join(
            f"{item.name} {item.expected_rps:.2f} ({item.low_rps:.2f}-{item.high_rps:.2f})"
            for item in self.forecast
        )
        words = [f"decision {self.number} ({self.trigger}): {self.verdict}, {self.reason}"]
        if rates:
            words.append(f"forecast requests/s: {rates}")
        if self.place is not None:
            words.append(self._followed(self.place))
        elif self.candidate_plan:
            words.append(
                f"plan {self.candidate_plan} serves {self.candidate_rps:.2f} requests/s, "
                f"{self.current_plan} {self.current_rps:.2f}; over {self.lasts_s:.0f} s "
                f"gain {self.gain_requests:.0f}, cost {self.cost_requests:.0f} requests "
                f"({self.changed_replicas} replicas in {self.switch_s:.0f} s)"
                + (
                    f", pays after {self.pays_after_s:.0f} s; missed so far "
                    f"{self.missed_requests:.0f}"
                    if self.pays_after_s is not None
                    else ""
                )
            )
        return "; ".join([*words, *([self.detail] if self.detail else [])])

    def _followed(self, place: LadderPlace) -> str:
        """The place on the ladder, and the switch that it asks for."""
        words = (
            f"load {place.load:.0%} of the capacity, expected {place.expected_load:.0%}, "
            f"to hold {place.required_load:.0%}: {place.rung}"
        )
        if self.candidate_plan in {"", self.current_plan}:
            return words
        return (
            f"{words} (plan {self.candidate_plan}) costs {place.candidate_cost:.2f} of the best, "
            f"{self.current_plan} {place.current_cost:.2f}; gain {place.gain_per_s:.2f}/s, "
            f"so far {place.regret:.0f}, price {place.price:.0f} "
            f"({self.changed_replicas} replicas in {self.switch_s:.0f} s)"
        )
