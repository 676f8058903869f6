"""Fits the constants of ``SwitchCosts`` to measured switches, and measures how well they predict.

Each phase is a line without negative coefficients: preparing over the engines that start at once,
transferring over the seconds for which the plan keeps the busiest idle link, verifying over the
bytes that the fullest device receives. Phases that do not depend on the plan are medians.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

import numpy as np
from scipy.optimize import nnls

from oserve.core import OServeError
from oserve.switch.costs import SwitchCosts

PHASES = ("prepare", "transfer", "verify", "commit", "drain")
# No transfer is faster than its links.
_MOST_SHARE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSwitch:
    """One wave, with the seconds of each phase as the server reports them.

    ``engines``: the most that started on one host. ``busy_s`` and ``given_bytes`` are of its plan;
    the latter are the most that one device receives.
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
    """Return the constants that fit best; ``start`` gives those that these switches do not tell.

    The cost of a further engine is not told where equally many started each time, nor that of
    joining where all plans kept the links busy equally long. Raises OServeError for no switches.
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
    """Return the predicted seconds of each phase, without what plans do not show."""
    return {
        "prepare": costs.engine_start_s + (one.engines - 1) * costs.further_start_s,
        "transfer": costs.join_s + one.busy_s / costs.link_share,
        "verify": costs.verify_s + one.given_bytes * costs.check_s_per_byte,
        "commit": costs.commit_s,
        "drain": costs.drain_s,
    }


def left_out_errors(measured: Sequence[MeasuredSwitch]) -> list[float]:
    """Return each switch's error of the time until it serves, by costs fitted to the others.

    Errors are signed shares of that time: 0.1 is a tenth too long.
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
    """Return JSON values, field by field."""
    return {field.name: float(f"{getattr(costs, field.name):.4g}") for field in fields(costs)}


def _line(x: Sequence[float], y: Sequence[float], *, slope: float) -> tuple[float, float]:
    """Return intercept and slope, neither negative; the given slope if the data tells none."""
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
