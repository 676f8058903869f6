"""The paper's model: one small LSTM per type, which predicts a window from the last fifty.

``lstm_train`` trains it to a file of arrays with their normalisation (log1p counts, less their
mean, over their deviation). Inference uses NumPy and does not need torch.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oserve.core import OServeError
from oserve.forecast.model import Ring
from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

WINDOW = 50
_ARRAYS = ("input", "hidden", "bias", "output", "output_bias", "mean", "deviation")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LstmWeights:
    """k networks of h cells: ``input`` (k, 4h), ``hidden`` (k, 4h, h), ``bias`` (k, 4h) in torch's
    order of gates (input, forget, cell, output), ``output`` (k, h), ``output_bias`` (k,), and the
    normalisation ``mean`` and ``deviation`` (k,). ``window`` is the length of their input.
    """

    names: tuple[str, ...]
    interval_s: float
    window: int
    input: Floats
    hidden: Floats
    bias: Floats
    output: Floats
    output_bias: Floats
    mean: Floats
    deviation: Floats


def write_lstm(weights: LstmWeights, path: Path) -> None:
    """Write a .npz file. Raises OServeError if it cannot be written."""
    arrays = {name: getattr(weights, name) for name in _ARRAYS}
    try:
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                names=np.array(weights.names),
                interval_s=np.array(weights.interval_s),
                window=np.array(weights.window),
                **arrays,
            )
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="check the path"
        ) from None


def read_lstm(path: Path) -> LstmWeights:
    """Read what ``write_lstm`` wrote. Raises OServeError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = LstmWeights(
                names=tuple(file["names"].tolist()),
                interval_s=float(file["interval_s"]),
                window=int(file["window"]),
                **{name: np.asarray(file[name], dtype=np.float64) for name in _ARRAYS},
            )
        k, cells = found.output.shape
        fits = (
            found.hidden.shape == (k, 4 * cells, cells)
            and found.input.shape == found.bias.shape == (k, 4 * cells)
            and found.mean.shape == found.deviation.shape == found.output_bias.shape == (k,)
            and len(found.names) == k
            and found.window >= 1
        )
        if not fits:
            raise ValueError
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else None
        raise OServeError(
            f"cannot read the model: {reason or 'it is no LSTM of OServe'}",
            place=str(path),
            remedy="give a file that oserve forecast train wrote",
        ) from None
    return found


class Lstm(Stateful):
    """Forecasts with trained weights; forecasts the level until its input is full."""

    _saved = ("_ring",)

    def __init__(self, weights: LstmWeights) -> None:
        self._weights = weights
        self._ring = Ring(weights.window, len(weights.names))

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        if np.isnan(counts).any() and self._ring.seen:
            counts = np.where(np.isnan(counts), self._ring.back(1), counts)
        self._ring.push(counts)

    def predict(self, steps: int) -> Floats:
        own = self._weights
        rows = self._ring.last(own.window)
        k = rows.shape[1]
        if len(rows) < own.window or np.isnan(rows).any():
            if not len(rows) or np.isnan(rows).all():
                return np.full((steps, k), np.nan)
            return np.tile(np.nan_to_num(rows[-1]), (steps, 1))
        series = (np.log1p(rows) - own.mean) / own.deviation
        hidden = cell = np.zeros_like(own.output)
        found = np.empty((steps, k))
        for x in series:
            hidden, cell = self._step(x, hidden, cell)
        for step in range(steps):
            y = (hidden * own.output).sum(axis=1) + own.output_bias
            found[step] = y
            if step + 1 < steps:
                hidden, cell = self._step(y, hidden, cell)
        # Forecasts are bounded to a hundred times the level of the training data.
        scaled = np.clip(found * own.deviation + own.mean, 0.0, own.mean + 5.0)
        return np.expm1(scaled)

    def _step(self, x: Floats, hidden: Floats, cell: Floats) -> tuple[Floats, Floats]:
        own = self._weights
        gates = x[:, None] * own.input + (own.hidden @ hidden[:, :, None])[:, :, 0] + own.bias
        into, forget, new, out = np.split(gates, 4, axis=1)
        cell = _sigmoid(forget) * cell + _sigmoid(into) * np.tanh(new)
        return _sigmoid(out) * np.tanh(cell), cell

    def shift(self, counts: Floats) -> None:
        self._ring.set_last(counts)


def _sigmoid(x: Floats) -> Floats:
    value: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return value
