"""Fitting the coefficients of one profile entry to its measured steps."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec.structs import asdict

from oserve.core import OServeError
from oserve.perf.fit import MeasuredStep, fit_coefficients, relative_errors
from oserve.perf.model import ModelFacts
from oserve.perf.profile import ProfileKey, ProfileStep, key_name, step_model_maker
from oserve.perf.roofline import Coefficients

# Peaks of a CPU slot are nominal, so a share of them may exceed 1 many times over.
_SHARE = (1e-3, 50.0)
_FREE = {
    "gemm": _SHARE,
    "memory": _SHARE,
    "kv": _SHARE,
    "attention": _SHARE,
    "step_s": (1e-6, 1.0),
    "sequence_s": (1e-8, 0.1),
    "wake_s": (1e-7, 1.0),
    "mixed_s": (1e-8, 0.1),
}
_FREE_TENSOR = {"all_reduce": _SHARE, "all_reduce_latency_s": (1e-8, 0.1)}
_FREE_PIPELINE = {"hop_s": (1e-7, 1.0)}
# One model cannot separate time per layer from time per step, so all of it goes to the step.
_START = Coefficients(
    gemm=0.3,
    memory=0.3,
    kv=0.3,
    attention=0.1,
    all_reduce=0.3,
    all_reduce_latency_s=1e-5,
    layer_s=0.0,
    mixed_s=1e-5,
    step_s=1e-3,
    sequence_s=1e-5,
    hop_s=1e-4,
    wake_s=1e-4,
)


def fit_entry(
    model: ModelFacts, device_kind: str, key: ProfileKey, steps: Sequence[ProfileStep]
) -> tuple[Coefficients, float]:
    """Coefficients fitted to ``steps``, and their mean absolute error in percent.

    Raises OServeError if there are fewer steps than coefficients.
    """
    free = dict(_FREE)
    if key[0] > 1:
        free |= _FREE_TENSOR
    if key[1] > 1:
        free |= _FREE_PIPELINE
    if len(steps) < len(free):
        raise OServeError(
            f"{len(steps)} measured steps are too few to fit {len(free)} coefficients",
            place=key_name(key),
            remedy="measure with a larger chunk budget or more sequences",
        )
    measured = [MeasuredStep(**asdict(step)) for step in steps]
    start = replace(
        _START,
        **{name: 0.0 for name in ("mixed_s", "wake_s") if not _covers(name, steps)},
        **{name: getattr(Coefficients(), name) for name in _FREE_TENSOR if name not in free},
        **({} if "hop_s" in free else {"hop_s": 0.0}),
    )
    free = {name: bounds for name, bounds in free.items() if _covers(name, steps)}
    make = step_model_maker(model, device_kind, key)
    fit = fit_coefficients(measured, {"": make}, free=free, start=start)
    errors = relative_errors(measured, {"": make(fit)})
    return fit, 100 * sum(abs(error) for error in errors) / len(errors)


def _covers(name: str, steps: Sequence[ProfileStep]) -> bool:
    """Whether any step depends on the coefficient."""
    if name == "mixed_s":
        return any(step.prefill_tokens and step.decode_seqs for step in steps)
    if name == "wake_s":
        return any(step.prefill_tokens and not step.decode_seqs for step in steps)
    return True
