"""The models by name, and their construction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oserve.core import OServeError
from oserve.forecast.arima import Arima
from oserve.forecast.experts import Combination
from oserve.forecast.lstm import Lstm, LstmWeights
from oserve.forecast.model import PointModel
from oserve.forecast.simple import Average, FittedSmoothing, Holt, Seasonal, periods_of

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Parameters of a model: number of types, seconds per window, and the trained LSTM if any."""

    k: int
    interval_s: float
    lstm: LstmWeights | None = None


def _lstm(settings: ModelSettings) -> PointModel:
    weights = settings.lstm
    if weights is None:
        raise ValueError("an LSTM is made from its weights")
    if len(weights.names) != settings.k or weights.interval_s != settings.interval_s:
        raise OServeError(
            f"the LSTM is of {len(weights.names)} types in windows of {weights.interval_s:g} s, "
            f"not {settings.k} in {settings.interval_s:g} s",
            place="--lstm",
            remedy="train one with the same --types and --interval-s",
        )
    return Lstm(weights)


MODELS: dict[str, Callable[[ModelSettings], PointModel]] = {
    DEFAULT: lambda s: Combination(s.k, periods_of(s.interval_s)),
    "last-value": lambda s: Average(s.k, 1),
    "moving-average": lambda s: Average(s.k, 5),
    "smoothing": lambda s: FittedSmoothing(s.k),
    "holt": lambda s: Holt(s.k),
    "seasonal-naive": lambda s: Seasonal(s.k, periods_of(s.interval_s), smoothed=False),
    "seasonal": lambda s: Seasonal(s.k, periods_of(s.interval_s), smoothed=True),
    "arima": lambda s: Arima(s.k),
    "lstm": _lstm,
}
"""Every model, the default first."""

SIMPLE = ("last-value", "moving-average", "smoothing", "holt", "seasonal-naive", "seasonal")
"""The models besides the default that need no optional package."""


def make_default(settings: ModelSettings) -> Combination:
    """Make the default model."""
    return Combination(settings.k, periods_of(settings.interval_s))


def make_model(name: str, settings: ModelSettings) -> PointModel:
    """Make a model. Raises OServeError for an unknown name or a missing dependency."""
    if name not in MODELS:
        raise OServeError(
            f"no model is called {name!r}",
            place="--models",
            remedy="the models are " + ", ".join(MODELS),
        )
    return MODELS[name](settings)


def known(names: Sequence[str]) -> tuple[str, ...]:
    """The names without duplicates, default first. Raises OServeError for an unknown one."""
    for name in names:
        if name not in MODELS:
            raise OServeError(
                f"no model is called {name!r}",
                place="--models",
                remedy="the models are " + ", ".join(MODELS),
            )
    return tuple(dict.fromkeys([DEFAULT, *names]))
