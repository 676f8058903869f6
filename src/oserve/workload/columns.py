"""Requests in columns, the form that clustering and counting work on."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


class TimedRequest(Protocol):
    """A request from any source: seconds from some origin, and lengths in tokens."""

    @property
    def arrival_s(self) -> float: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """Requests as three arrays of equal length, in the order of the source."""

    arrival_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats


def columns_of(requests: Iterable[TimedRequest]) -> Columns:
    """Collect a stream, at 24 bytes per request. An empty stream gives empty columns."""
    arrival, prompt, output = array("d"), array("d"), array("d")
    for item in requests:
        arrival.append(item.arrival_s)
        prompt.append(item.prompt_tokens)
        output.append(item.output_tokens)
    return Columns(
        arrival_s=np.array(arrival, dtype=np.float64),
        prompt_tokens=np.array(prompt, dtype=np.float64),
        output_tokens=np.array(output, dtype=np.float64),
    )


def zero_traffic() -> OServeError:
    """The error for a trace without requests."""
    return OServeError(
        "zero traffic: the trace has no requests",
        place="trace",
        remedy="give a trace with at least one request, or arrival rates instead",
    )
