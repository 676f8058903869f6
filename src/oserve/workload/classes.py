"""Length classes from workload types: what can be told of a type when a request arrives.

A router sees the prompt and not the answer, so types whose prompts are alike are one class to it,
with the answer that they have between them.
"""

import itertools
import math
from collections.abc import Sequence

from oserve.core import LengthClass
from oserve.workload.columns import Floats
from oserve.workload.model import TypeStatistics, WorkloadModel
from oserve.workload.names import prompt_names

APART = 1.6
"""Factor between prompt centres from which the types of two requests can be told apart."""


def length_classes(
    model: WorkloadModel, rates_rps: Sequence[float] | Floats
) -> tuple[tuple[LengthClass, ...], dict[str, str]]:
    """Classes by ascending prompt, and the name of the class of each type, by its name.

    Neighbours, by prompt centre (1 + tokens), within a factor of 1.6 share a class. A class ends
    at the geometric mean of the two centres on either side of its end, the same line that k-means
    draws, so that each centre is in its type's class. The expected output is the types' mean
    weighted by ``rates_rps`` (k of them), plainly when none of them comes, and at least 1.
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
    classes = []
    class_of = {}
    for group, bound, name in zip(groups, bounds, prompt_names(middles), strict=True):
        classes.append(
            LengthClass(name=name, max_prompt_tokens=bound, output_tokens=_expected(group))
        )
        class_of.update({item.name: name for item, _ in group})
    return tuple(classes), class_of


def _expected(group: Sequence[tuple[TypeStatistics, float]]) -> int:
    total = math.fsum(rate for _, rate in group)
    if total > 0:
        mean = math.fsum(item.output_tokens * rate for item, rate in group) / total
    else:
        mean = math.fsum(item.output_tokens for item, _ in group) / len(group)
    return max(1, round(mean))
