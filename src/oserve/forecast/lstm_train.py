"""Training of the per-type LSTMs by mean squared error on log counts; loads torch when called."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oserve.core import OServeError
from oserve.forecast.lstm import WINDOW, LstmWeights
from oserve.workload.columns import Floats

FEWEST = 8
"""The fewest windows of counts to train on."""

_SAMPLES = 2000


def train_lstm(
    counts: Floats,
    names: Sequence[str],
    *,
    interval_s: float,
    cells: int = 32,
    rounds: int = 150,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LstmWeights:
    """Train one network per type on counts (n, k), oldest first, none missing; seeded.

    The input is the last 50 windows, or a third of a shorter history. Training uses at most the
    last 2,000 windows, holds back a twentieth for validation and keeps the best round. Raises
    OServeError without torch or with too little history.
    """
    n, k = counts.shape
    if n < FEWEST:
        raise OServeError(
            f"{n} windows are too few to train on",
            place="--trace",
            remedy=f"give at least {FEWEST}: a longer trace or a shorter interval",
        )
    try:
        import torch  # noqa: PLC0415 - an extra
    except ImportError:
        raise OServeError(
            "training an LSTM needs torch",
            place="--models",
            remedy="pip install torch, or leave lstm out",
        ) from None
    window = min(WINDOW, max(2, n // 3))
    logs = np.log1p(counts)
    mean, deviation = logs.mean(axis=0), np.maximum(logs.std(axis=0), 0.05)
    series = (logs - mean) / deviation
    places = np.arange(max(window, n - _SAMPLES), n)
    x = np.stack([series[place - window : place] for place in places])
    y = series[places]
    nets: list[Any] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for kind in range(k):
                nets.append(_fit(torch, x[:, :, kind], y[:, kind], cells, rounds))
                if progress is not None:
                    progress(kind + 1, k)
    finally:
        torch.set_num_threads(threads)

    def stacked(name: str) -> Floats:
        return np.stack([net[name].numpy().astype(np.float64) for net in nets])

    return LstmWeights(
        names=tuple(names),
        interval_s=interval_s,
        window=window,
        input=stacked("0.weight_ih_l0")[:, :, 0],
        hidden=stacked("0.weight_hh_l0"),
        bias=stacked("0.bias_ih_l0") + stacked("0.bias_hh_l0"),
        output=stacked("1.weight")[:, 0],
        output_bias=stacked("1.bias")[:, 0],
        mean=mean,
        deviation=deviation,
    )


def _fit(torch: Any, x: Floats, y: Floats, cells: int, rounds: int) -> dict[str, Any]:
    """The parameters of the best round, by name."""
    inputs = torch.tensor(x, dtype=torch.float32)[:, :, None]
    wanted = torch.tensor(y, dtype=torch.float32)[:, None]
    held = max(1, len(x) // 20)
    net = torch.nn.ModuleList(
        [torch.nn.LSTM(1, cells, batch_first=True), torch.nn.Linear(cells, 1)]
    )
    tuner = torch.optim.Adam(net.parameters(), lr=0.01)
    best = {name: item.detach().clone() for name, item in net.state_dict().items()}
    least = math.inf
    for _ in range(rounds):
        tuner.zero_grad()
        error = (net[1](net[0](inputs)[0][:, -1]) - wanted) ** 2
        learned = error[:-held] if len(x) > held + 1 else error
        score = float(error[-held:].detach().mean() + 0.2 * learned.detach().mean())
        if score < least:
            least = score
            best = {name: item.detach().clone() for name, item in net.state_dict().items()}
        learned.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        tuner.step()
    return best
