"""The constants of ``SwitchCosts`` from switches that were measured, and how well they tell them.

Each phase is a line with no negative coefficient: preparing over the engines that start at once,
transferring over the seconds for which the plan keeps the busiest of idle links, verifying over the
bytes that the fullest device is given. Phases that do not depend on the plan are medians.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

import numpy as np
from scipy.optimize import nnls

from oserve.core import OServeError
from oserve.switch.costs import SwitchCosts

PHASES = ("prepare", "transfer", "verify", "commit", "drain")
# Nobody's transfers are faster than their links.
_MOST_SHARE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSwitch:
    """One wave. ``engines``: the most that started on one host; ``busy_s``: of its plan, as are
    ``given_bytes``, the most that one device is given.

    Seconds of each phase, as the server reports them.
    """

    engines: int
    busy_s: float
    given_bytes: int
    prepare_s: float
    transfer_s: float
    verify_s: float
    commit_s: float
    drain_s: float


def fit_costs(measured: Sequence[MeasuredSwitch], start: SwitchCosts | None = None) -> SwitchCosts:
    """``start``: where what cannot be told from these comes from. Raises OServeError for none.

    How a further engine differs from the first cannot be told where as many started each time, nor
    how joining differs from copying where all plans took the links as long.
    """
    if not measured:
        raise OServeError(
            "no switch was measured", place="switch costs", remedy="give some that were done"
        )
    costs = start or SwitchCosts()
    first_s, further_s = _line(
        [one.engines - 1 for one in measured],
        [one.prepare_s for one in measured],
        slope=costs.further_start_s,
    )
    join_s, per_busy_s = _line(
        [one.busy_s for one in measured],
        [one.transfer_s for one in measured],
        slope=1 / costs.link_share,
    )
    verify_s, check_s_per_byte = _line(
        [one.given_bytes for one in measured],
        [one.verify_s for one in measured],
        slope=costs.check_s_per_byte,
    )
    return replace(
        costs,
        engine_start_s=first_s,
        further_start_s=further_s,
        join_s=join_s,
        link_share=min(_MOST_SHARE, 1 / per_busy_s) if per_busy_s > 0 else _MOST_SHARE,
        verify_s=verify_s,
        check_s_per_byte=check_s_per_byte,
        commit_s=median(one.commit_s for one in measured),
        drain_s=median(one.drain_s for one in measured),
    )


def predicted_s(costs: SwitchCosts, one: MeasuredSwitch) -> dict[str, float]:
    """What these costs say of each phase of a switch, but what plans do not show."""
    return {
        "prepare": costs.engine_start_s + (one.engines - 1) * costs.further_start_s,
        "transfer": costs.join_s + one.busy_s / costs.link_share,
        "verify": costs.verify_s + one.given_bytes * costs.check_s_per_byte,
        "commit": costs.commit_s,
        "drain": costs.drain_s,
    }


def left_out_errors(measured: Sequence[MeasuredSwitch]) -> list[float]:
    """Of each switch, how wrong costs fitted to the others are about the time until it serves.

    As a share of that time, signed: 0.1 is a tenth too long.
    """
    errors = []
    for number, one in enumerate(measured):
        others = [*measured[:number], *measured[number + 1 :]]
        if not others:
            continue
        told = predicted_s(fit_costs(others), one)
        took_s = sum(getattr(one, f"{phase}_s") for phase in PHASES[:-1])
        errors.append(sum(told[phase] for phase in PHASES[:-1]) / took_s - 1)
    return errors


def costs_document(costs: SwitchCosts) -> dict[str, float]:
    """Plain data, field by field."""
    return {field.name: float(f"{getattr(costs, field.name):.4g}") for field in fields(costs)}


def _line(x: Sequence[float], y: Sequence[float], *, slope: float) -> tuple[float, float]:
    """Intercept and slope, neither negative; the given slope where there is no telling."""
    places = np.asarray(x, dtype=float)
    values = np.asarray(y, dtype=float)
    widest = float(np.abs(places).max())
    if np.ptp(places) <= 1e-9 * max(1e-6, widest):
        at = float(np.median(values))
        slope = min(slope, at / widest) if widest > 0 else slope
        return max(0.0, at - slope * widest), slope
    # Places are scaled, since seconds and bytes differ by ten orders of magnitude.
    (intercept, found), _ = nnls(np.stack([np.ones_like(places), places / widest], axis=1), values)
    return float(intercept), float(found) / widest
