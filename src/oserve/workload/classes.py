"""Length classes from workload types: what the prompt alone says about a request's type.

A router sees the prompt but not the answer, so types with similar prompts form one class, with
their mean answer. The prompts of types overlap, so a class also holds requests of neighbouring
types; ``class_mixes`` measures how many.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from oserve.core import LengthClass
from oserve.workload.columns import Columns, Floats, Indices
from oserve.workload.model import TypeStatistics, WorkloadModel
from oserve.workload.names import prompt_names

APART = 1.6
"""The least factor between two prompt centres at which prompts distinguish the types."""


def length_classes(
    model: WorkloadModel,
    rates_rps: Sequence[float] | Floats,
    *,
    requests: Columns | None = None,
) -> tuple[tuple[LengthClass, ...], dict[str, str]]:
    """Classes by ascending prompt, and the name of the class of each type, by its name.

    Neighbours whose prompt centres (1 + tokens) are within a factor of 1.6 share a class. A class
    ends at the geometric mean of the two centres on either side, which is also the boundary of
    k-means, so each centre is in its type's class. The expected output of a class (at least 1) is
    the mean over its ``requests``. Without requests it is the mean of its types weighted by
    ``rates_rps`` (k of them; unweighted if all are 0), which is inaccurate where types overlap.
    """
    pairs = sorted(
        zip(model.types, (float(rate) for rate in rates_rps), strict=True),
        key=lambda pair: pair[0].centre,
    )
    groups: list[list[tuple[TypeStatistics, float]]] = []
    for pair in pairs:
        # Centres are logarithms.
        near = groups and pair[0].centre[0] - groups[-1][-1][0].centre[0] < math.log(APART)
        if near:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    bounds: list[int | None] = []
    least = 1
    for lower, upper in itertools.pairwise(groups):
        between = (lower[-1][0].centre[0] + upper[0][0].centre[0]) / 2
        least = max(least, math.floor(math.expm1(between)))
        bounds.append(least)
        least += 1
    bounds.append(None)
    middles = [
        math.expm1(math.fsum(item.centre[0] for item, _ in group) / len(group)) for group in groups
    ]
    held = None if requests is None else _held(bounds, requests)
    classes = []
    class_of = {}
    for at, (group, bound, name) in enumerate(
        zip(groups, bounds, prompt_names(middles), strict=True)
    ):
        mean = _expected(group)
        if requests is not None and np.any(held == at):
            mean = float(requests.output_tokens[held == at].mean())
        classes.append(
            LengthClass(name=name, max_prompt_tokens=bound, output_tokens=max(1, round(mean)))
        )
        class_of.update({item.name: name for item, _ in group})
    return tuple(classes), class_of


def class_mixes(classes: Sequence[LengthClass], model: WorkloadModel, requests: Columns) -> Floats:
    """The shares of the k types among the requests of each class, shape (classes, k).

    A row sums to 1, or is 0 for a class without requests. ``class_mixes @ shares`` converts routing
    shares of types to those of classes.
    """
    held = _held([item.max_prompt_tokens for item in classes], requests)
    kinds = model.assign(requests.prompt_tokens, requests.output_tokens)
    cells = np.bincount(held * model.k + kinds, minlength=len(classes) * model.k)
    counts = cells.reshape(len(classes), model.k)
    return np.asarray(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)), dtype=np.float64)


def _held(bounds: Sequence[int | None], requests: Columns) -> Indices:
    """The class of each request, shape (n,), by ascending upper bounds of the prompt."""
    finite = [bound for bound in bounds if bound is not None]
    return np.searchsorted(finite, requests.prompt_tokens, side="left")


def _expected(group: Sequence[tuple[TypeStatistics, float]]) -> float:
    total = math.fsum(rate for _, rate in group)
    if total > 0:
        return math.fsum(item.output_tokens * rate for item, rate in group) / total
    return math.fsum(item.output_tokens for item, _ in group) / len(group)
