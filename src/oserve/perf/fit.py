"""Fitting the roofline's coefficients to measured steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.perf.roofline import Coefficients, StepModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One measured step: its work (see ``StepModel``) and the seconds it took.

    ``engine`` names the measured engine that ran it.
    """

    prefill_tokens: float
    attended_tokens: float
    decode_seqs: float
    kv_tokens: float
    seconds: float
    engine: str = ""


def fit_coefficients(
    steps: Sequence[MeasuredStep],
    models: Mapping[str, Callable[[Coefficients], StepModel]],
    *,
    free: Mapping[str, tuple[float, float]],
    start: Coefficients,
    tied: Mapping[str, str] | None = None,
) -> Coefficients:
    """The coefficients that minimise the squared log error over ``steps``.

    ``models`` makes the step model of each engine from coefficients. ``free`` names the
    coefficients to fit, with bounds over 0; ``tied`` maps a name to the free coefficient whose
    value it takes. A log error gives a step of 1 ms the weight of one of 1 s, and treats a factor
    of two alike in both directions.
    """
    # Importing SciPy takes longer than most commands that import this module.
    from scipy.optimize import least_squares  # noqa: PLC0415

    names = list(free)
    low = np.log([free[name][0] for name in names])
    high = np.log([free[name][1] for name in names])
    by_engine = {name: [step for step in steps if step.engine == name] for name in models}
    columns = {
        name: np.array(
            [
                (s.prefill_tokens, s.attended_tokens, s.decode_seqs, s.kv_tokens, s.seconds)
                for s in rows
            ]
        ).T
        for name, rows in by_engine.items()
        if rows
    }

    def made(logs: np.ndarray) -> Coefficients:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        values.update({name: values[source] for name, source in (tied or {}).items()})
        return replace(start, **values)

    def errors(logs: np.ndarray) -> np.ndarray:
        fit = made(logs)
        return np.concatenate(
            [
                np.log(models[name](fit).step_s(*rows[:4]) / rows[4])
                for name, rows in columns.items()
            ]
        )

    guess = np.log([max(getattr(start, name), free[name][0]) for name in names])
    inside = np.clip(guess, low + 1e-9, high - 1e-9)
    # A soft loss makes the fit robust to a few disturbed steps.
    found = least_squares(errors, inside, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return made(found.x)


def relative_errors(steps: Sequence[MeasuredStep], models: Mapping[str, StepModel]) -> list[float]:
    """Predicted over measured time, less 1, of each step."""
    return [
        float(
            models[step.engine].step_s(
                step.prefill_tokens, step.attended_tokens, step.decode_seqs, step.kv_tokens
            )
            / step.seconds
            - 1.0
        )
        for step in steps
    ]
