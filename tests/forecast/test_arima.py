"""The ARIMA baseline."""

import sys

import numpy as np
import pytest

from oserve.core import OServeError
from oserve.forecast.arima import Arima
from oserve.forecast.backtest import Series, backtest


def test_without_statsforecast_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsforecast.models", None)
    with pytest.raises(OServeError, match="statsforecast") as caught:
        Arima(1)
    assert "oserve[forecast]" in caught.value.remedy


@pytest.mark.extra
def test_it_follows_what_it_can_learn() -> None:
    rng = np.random.default_rng(1)
    level = np.zeros(80)
    for place in range(1, 80):
        level[place] = -0.8 * level[place - 1] + rng.normal(0, 0.3)
    parts = rng.poisson(200 * np.exp(level))[:, None, None].astype(float)
    made = Series(names=("a",), interval_s=60.0, start_s=0.0, parts=parts)
    report = backtest(made, ("arima", "last-value"), timer=lambda: 0.0)
    scores = {walk.score.model: walk.score.rrmse for walk in report.walks}
    assert scores["arima"] < 0.7 * scores["last-value"]
    gap = Arima(1)
    for row in (*parts[:20, 0], np.array([np.nan])):
        gap.update(row, row[None])
    assert np.isfinite(gap.predict(3)).all()
