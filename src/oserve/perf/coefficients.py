"""The roofline coefficients of a device kind and precision, and their origin."""

from dataclasses import dataclass

from oserve.core import Precision
from oserve.perf.catalogue import catalogue
from oserve.perf.device import find_device
from oserve.perf.roofline import Coefficients, coefficients_from

# For a precision without a fit, the one with the most similar arithmetic.
_ALIKE = {
    Precision.FP32: Precision.BF16,
    Precision.FP16: Precision.BF16,
    Precision.INT8: Precision.FP8,
    Precision.INT4: Precision.BF16,
}
_STAND_IN = "H100"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCoefficients:
    """Coefficients with their ``origin`` in words; ``fitted`` is false for borrowed ones."""

    coefficients: Coefficients
    origin: str
    fitted: bool


def find_coefficients(device_kind: str, precision: Precision) -> FittedCoefficients:
    """Fitted ones if there are any, else those of the most similar precision and device."""
    table = catalogue("coefficients")
    device = find_device(device_kind)
    like = _ALIKE.get(precision, precision)
    if device.flops.get(like.value) is None:
        # Weights widened to 16 bits before multiplication compute like 16-bit weights.
        like = Precision.BF16
    for kind in (device.kind, _STAND_IN):
        row = table.get(kind, {}).get(like.value)
        if row is None:
            continue
        fitted = kind == device.kind and like is precision
        origin = f"fitted on {kind} in {like}"
        return FittedCoefficients(
            coefficients=coefficients_from(row),
            origin=origin if fitted else f"borrowed: {origin}",
            fitted=fitted,
        )
    return FittedCoefficients(
        coefficients=Coefficients(), origin="borrowed: textbook values", fitted=False
    )
