"""Workload types learned from requests: centres, names, statistics, and the type of a request.

A type is the set of requests nearest to its centre in the plane of log1p(prompt tokens) and
log1p(output tokens), where equal distances are equal factors of length. This module holds data and
needs only NumPy; ``types`` fits it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError
from oserve.workload.columns import Floats, Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthQuantiles:
    """Quantiles of one length within one type, in tokens."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeStatistics:
    """One workload type.

    ``centre`` is (log1p prompt, log1p output); ``share`` is the type's share of the requests.
    ``prompt_tokens`` and ``output_tokens`` are means, so that token rates are exact.
    """

    name: str
    centre: tuple[float, float]
    share: float
    prompt_tokens: float
    output_tokens: float
    prompt_quantiles: LengthQuantiles
    output_quantiles: LengthQuantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadModel:
    """The types by ascending centre; a type's index is its position. Plain data."""

    types: tuple[TypeStatistics, ...]

    @property
    def k(self) -> int:
        """The number of types."""
        return len(self.types)

    @property
    def names(self) -> tuple[str, ...]:
        """Unique names in lower-case ASCII."""
        return tuple(item.name for item in self.types)

    def assign(self, prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike) -> Indices:
        """The type of each request, shape (n,): the nearest centre, the first of equals.

        Raises OServeError for invalid lengths.
        """
        points = log_lengths(prompt_tokens, output_tokens)
        return nearest(points, np.array([item.centre for item in self.types]))


def log_lengths(prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike) -> Floats:
    """Log1p of both lengths, shape (n, 2). Raises OServeError, naming the first bad request."""
    prompt = np.asarray(prompt_tokens, dtype=np.float64)
    output = np.asarray(output_tokens, dtype=np.float64)
    if prompt.ndim != 1 or prompt.shape != output.shape:
        raise ValueError(f"lengths of shapes {prompt.shape} and {output.shape}, not (n,) twice")
    for name, lengths in (("prompt", prompt), ("output", output)):
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths >= 0)))
        if bad.size:
            raise OServeError(
                f"the {name} length is {lengths[bad[0]]:g}, not a count of tokens",
                place=f"request {bad[0] + 1}",
                remedy="correct the trace",
            )
    return np.log1p(np.stack([prompt, output], axis=1))


def nearest(points: Floats, centres: Floats) -> Indices:
    """The nearest of centres (k, 2) to each of points (n, 2), shape (n,), in O(n) memory."""
    best = np.zeros(len(points), dtype=np.intp)
    least = np.full(len(points), np.inf)
    for index, centre in enumerate(centres):
        distance = np.square(points - centre).sum(axis=1)
        closer = distance < least
        best[closer] = index
        least[closer] = distance[closer]
    return best
