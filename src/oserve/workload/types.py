"""Workload types from requests, by k-means on log1p of both lengths.

scikit-learn is loaded only when types are fitted. Lengths span four orders of magnitude and their
costs are proportional, so distances are taken between logarithms (the paper clusters lengths; it
does not say on which scale).

The result does not depend on the order of the requests: they are sorted before sampling, and one
thread sums them. The centres are iterated to their fixed point, the means of the requests nearest
to them, which scikit-learn only approaches.
"""

import math

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from oserve.core import OServeError
from oserve.workload.columns import Floats, zero_traffic
from oserve.workload.model import (
    LengthQuantiles,
    TypeStatistics,
    WorkloadModel,
    log_lengths,
    nearest,
)
from oserve.workload.names import tokens_at, type_names

MAX_CHOSEN = 6
"""The most types that are chosen automatically."""

MAX_TYPES = 64
"""The most types that a caller may ask for."""

MIN_GAIN = 0.08
"""The least share of the total variance that one more type must explain."""

ALIKE = math.log(1.2)
"""The root-mean-square distance to the centre below which requests of a type count as equal."""

_SAMPLE = 50_000
_STARTS = 4
_ROUNDS = 200


def fit_types(
    prompt_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    *,
    k: int | None = None,
    seed: int = 0,
) -> WorkloadModel:
    """Fit types to requests with these lengths, each of shape (n,), in tokens.

    ``k`` is the number of types; there are fewer only if fewer requests are distinct. The default
    is the smallest k from 1 to 6 such that one more type would explain less than 8 % of the
    variance of the log lengths, or such that requests lie within 20 % of their type's centre. Each
    further type adds a series to forecast and a column to every plan, and makes all counts noisier
    (1/sqrt(m)). In Azure's 2023 mix the second to sixth type explain 46, 22, 9, 7 and 3 %: four
    types, as published.

    With more than 50,000 requests, clustering uses a seeded sample of that size; shares, means and
    quantiles always cover all. Raises OServeError for no requests, invalid lengths, or k outside
    1 to 64.
    """
    if k is not None and not 1 <= k <= MAX_TYPES:
        raise OServeError(
            f"{k} workload types cannot be made", place="k", remedy=f"give 1 to {MAX_TYPES}"
        )
    points = log_lengths(prompt_tokens, output_tokens)
    if not len(points):
        raise zero_traffic()
    order = np.lexsort((points[:, 1], points[:, 0]))
    points = points[order]
    sample = points
    if len(points) > _SAMPLE:
        drawn = np.random.default_rng(seed).choice(len(points), _SAMPLE, replace=False)
        sample = points[np.sort(drawn)]
    distinct = 1 + int(np.any(np.diff(sample, axis=0) != 0, axis=1).sum())
    if k is None:
        centres = _chosen(sample, min(MAX_CHOSEN, distinct), seed)
    else:
        centres = _centres(sample, min(k, distinct), seed)
    return _model(
        points,
        centres,
        np.asarray(prompt_tokens, dtype=np.float64)[order],
        np.asarray(output_tokens, dtype=np.float64)[order],
    )


def _chosen(points: Floats, most: int, seed: int) -> Floats:
    centres = _centres(points, 1, seed)
    whole = left = _variance(points, centres)
    for k in range(2, most + 1):
        if math.sqrt(left) <= ALIKE:
            break
        more = _centres(points, k, seed)
        then = _variance(points, more)
        if left - then < MIN_GAIN * whole:
            break
        centres, left = more, then
    return centres


def _variance(points: Floats, centres: Floats) -> float:
    """The mean squared distance to the nearest centre."""
    return float(np.square(points - centres[nearest(points, centres)]).sum() / len(points))


def _centres(points: Floats, k: int, seed: int) -> Floats:
    """Centres of k types of sorted points, by ascending (prompt, output); shape (k, 2)."""
    if k == 1:
        return np.stack([points.sum(axis=0) / len(points)])
    # Importing scikit-learn takes longer than most commands that import this module.
    from sklearn.cluster import KMeans  # noqa: PLC0415

    # The work is too small for several threads, which would compete with engines on this machine.
    with threadpool_limits(1):
        found = KMeans(n_clusters=k, n_init=_STARTS, random_state=seed).fit(points)
    centres: Floats = np.asarray(found.cluster_centers_, dtype=np.float64)
    labels = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        now = nearest(points, centres)
        if np.array_equal(now, labels):
            break
        labels = now
        counts = np.bincount(labels, minlength=len(centres))
        sums = np.stack(
            [np.bincount(labels, points[:, axis], len(centres)) for axis in (0, 1)], axis=1
        )
        centres = sums[counts > 0] / counts[counts > 0, None]
        if not counts.all():
            labels = np.full(len(points), -1)
    ordered: Floats = centres[np.lexsort((centres[:, 1], centres[:, 0]))]
    return ordered


def _model(points: Floats, centres: Floats, prompt: Floats, output: Floats) -> WorkloadModel:
    # Ties may resolve differently once centres are sorted, which can leave a centre without
    # requests.
    centres = centres[np.unique(nearest(points, centres))]
    labels = nearest(points, centres)
    pairs = [(float(centre[0]), float(centre[1])) for centre in centres]
    names = type_names([tokens_at(pair) for pair in pairs])
    types = []
    for index, (name, pair) in enumerate(zip(names, pairs, strict=True)):
        mine = labels == index
        types.append(
            TypeStatistics(
                name=name,
                centre=pair,
                share=float(mine.mean()),
                prompt_tokens=float(prompt[mine].mean()),
                output_tokens=float(output[mine].mean()),
                prompt_quantiles=_quantiles(prompt[mine]),
                output_quantiles=_quantiles(output[mine]),
            )
        )
    return WorkloadModel(types=tuple(types))


def _quantiles(lengths: Floats) -> LengthQuantiles:
    p50, p95, p99 = np.quantile(lengths, [0.50, 0.95, 0.99])
    return LengthQuantiles(p50=float(p50), p95=float(p95), p99=float(p99))
