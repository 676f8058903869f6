"""Length classes from workload types: what can be told of a type when a request arrives.

A router sees the prompt and not the answer, so types whose prompts are alike are one class to it,
with the answer that they have between them. Types overlap in their prompts, so a class also holds
requests of its neighbours' types; ``class_mixes`` measures how many.
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
"""Factor between prompt centres from which the types of two requests can be told apart."""


def length_classes(
    model: WorkloadModel,
    rates_rps: Sequence[float] | Floats,
    *,
    requests: Columns | None = None,
) -> tuple[tuple[LengthClass, ...], dict[str, str]]:
    """Classes by ascending prompt, and the name of the class of each type, by its name.

    Neighbours, by prompt centre (1 + tokens), within a factor of 1.6 share a class. A class ends
    at the geometric mean of the two centres on either side of its end, the same line that k-means
    draws, so that each centre is in its type's class. The expected output is the mean of those of
    ``requests`` that the class holds. Without any it is the types' mean weighted by ``rates_rps``
    (k of them), plainly when none of them comes, which is far off where types overlap. At least 1.
    """
    pairs = sorted(
        zip(model.types, (float(rate) for rate in rates_rps), strict=True),
        key=lambda pair: pair[0].centre,
    )
    groups: list[list[tuple[TypeStatistics, float]]] = []
    for pair in pairs:
        # Compared as logarithms, which is what centres are.
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
    """What each class is made of: shares of the k types among its requests, shape (classes, k).

    Rows sum to 1, or are 0 for a class that holds none of the requests. With it the routing shares
    of types become those of classes: ``class_mixes @ shares``.
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
