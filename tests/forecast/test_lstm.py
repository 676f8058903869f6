"""The LSTM: its file, its arithmetic, and (with torch) its training."""

from pathlib import Path

import numpy as np
import pytest

from oserve.core import OServeError
from oserve.forecast.lstm import Lstm, LstmWeights, read_lstm, write_lstm
from oserve.forecast.lstm_train import train_lstm
from oserve.forecast.models import ModelSettings, make_model

from . import series

NAMES = ("a", "b", "c", "d")


def weights(window: int = 6, cells: int = 3, k: int = 4) -> LstmWeights:
    rng = np.random.default_rng(1)
    return LstmWeights(
        names=NAMES[:k],
        interval_s=60.0,
        window=window,
        input=rng.normal(size=(k, 4 * cells)),
        hidden=rng.normal(size=(k, 4 * cells, cells)),
        bias=rng.normal(size=(k, 4 * cells)),
        output=rng.normal(size=(k, cells)),
        output_bias=rng.normal(size=k),
        mean=np.full(k, 4.0),
        deviation=np.full(k, 0.5),
    )


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    write_lstm(weights(), path)
    again = read_lstm(path)
    assert again.names == NAMES
    assert (again.interval_s, again.window) == (60.0, 6)
    one, other = Lstm(weights()), Lstm(again)
    for row in series.flat(1, 10).sum(axis=1):
        one.update(row, row[None])
        other.update(row, row[None])
        assert np.array_equal(one.predict(5), other.predict(5))
    assert np.isfinite(one.predict(5)).all()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for place, content in enumerate((b"", b"nonsense", None)):
        path = tmp_path / f"{place}.npz"
        if content is None:
            np.savez(path, names=np.array(["a"]))
        else:
            path.write_bytes(content)
        with pytest.raises(OServeError, match="no LSTM"):
            read_lstm(path)
    with pytest.raises(OServeError, match="No such file"):
        read_lstm(tmp_path / "none.npz")
    with pytest.raises(OServeError, match="cannot write"):
        write_lstm(weights(), tmp_path / "no" / "folder.npz")


def test_it_must_be_of_the_same_types_and_windows() -> None:
    for settings in (
        ModelSettings(k=3, interval_s=60.0, lstm=weights()),
        ModelSettings(k=4, interval_s=30.0, lstm=weights()),
    ):
        with pytest.raises(OServeError, match="types"):
            make_model("lstm", settings)


def test_too_little_history_is_refused() -> None:
    with pytest.raises(OServeError, match="too few"):
        train_lstm(np.ones((5, 4)), NAMES, interval_s=60.0)


@pytest.mark.extra
def test_it_learns_and_forecasts_as_torch_does() -> None:
    import torch  # noqa: PLC0415

    counts = 100 * (
        1 + 0.8 * np.sin(np.arange(200)[:, None] * 2 * np.pi / np.array([7, 9, 11, 13]))
    )
    made = train_lstm(counts[:150], NAMES, interval_s=60.0, cells=8, rounds=40)
    same = train_lstm(counts[:150], NAMES, interval_s=60.0, cells=8, rounds=40)
    assert np.array_equal(made.hidden, same.hidden)
    model = Lstm(made)
    errors = []
    for place, row in enumerate(counts):
        if place >= 150:
            errors.append(model.predict(1)[0] - row)
        model.update(row, row[None])
    assert np.sqrt(np.mean(np.square(errors))) < 40
    net = torch.nn.LSTM(1, 8, batch_first=True)
    net.load_state_dict(
        {
            "weight_ih_l0": torch.tensor(made.input[0][:, None]),
            "weight_hh_l0": torch.tensor(made.hidden[0]),
            "bias_ih_l0": torch.tensor(made.bias[0]),
            "bias_hh_l0": torch.zeros(32),
        }
    )
    scaled = (np.log1p(counts[-50:, 0]) - made.mean[0]) / made.deviation[0]
    with torch.no_grad():
        hidden = net(torch.tensor(scaled, dtype=torch.float32)[None, :, None])[0][0, -1].numpy()
    said = float(hidden @ made.output[0] + made.output_bias[0])
    expected = np.expm1(said * made.deviation[0] + made.mean[0])
    assert model.predict(1)[0, 0] == pytest.approx(expected, rel=1e-3)
