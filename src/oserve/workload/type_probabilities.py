"""From the distribution of a request's output length to the probabilities of its workload type.

A type holds the requests nearest to its centre (see ``model``). For a given prompt length the
answer's length determines the type, so a distribution over answers gives one over types.
"""

import math
from collections.abc import Mapping, Sequence

from oserve.core import PlannedType, WorkloadType
from oserve.workload.output import BINS, OutputExpectation, bin_tokens, length_bin

# Prompts within a factor of 2**(1/4) share an entry.
_PER_DOUBLING = 4


class TypeProbabilities:
    """The probabilities of types with these centres, (prompt, output) in tokens; at least one."""

    def __init__(self, centres: Sequence[tuple[float, float]]) -> None:
        self._centres = [(math.log1p(prompt), math.log1p(output)) for prompt, output in centres]
        self._rows: dict[int, tuple[int, ...]] = {}

    def kind(self, prompt_tokens: float, output_tokens: float) -> int:
        """The index of the type of a request with these lengths; the first of equals."""
        x, y = math.log1p(prompt_tokens), math.log1p(output_tokens)
        distances = [(x - p) ** 2 + (y - o) ** 2 for p, o in self._centres]
        return distances.index(min(distances))

    def of(
        self, prompt_tokens: int, expected: OutputExpectation, limit: int | None = None
    ) -> tuple[float, ...]:
        """Probabilities of the types, in their order; they sum to 1.

        ``limit``: the most tokens that the answer may have.
        """
        place = round(_PER_DOUBLING * math.log2(prompt_tokens + 1))
        row = self._rows.get(place)
        if row is None:
            middle = 2.0 ** (place / _PER_DOUBLING) - 1.0
            row = tuple(self.kind(middle, bin_tokens(index)) for index in range(BINS))
            self._rows[place] = row
        probabilities = [0.0] * len(self._centres)
        last = BINS - 1 if limit is None else length_bin(max(1, limit))
        # Longer answers end at the limit.
        for kind, p in zip(row[:last], expected.probabilities[:last], strict=True):
            probabilities[kind] += p
        probabilities[row[last]] += sum(expected.probabilities[last:])
        return tuple(probabilities)


class TypesOfTier:
    """The types of one service tier among all types of a plan: ``places`` of ``total``."""

    def __init__(
        self, centres: Sequence[tuple[float, float]], places: Sequence[int], total: int
    ) -> None:
        self._own = TypeProbabilities(centres)
        self._places = tuple(places)
        self._total = total

    def kind(self, prompt_tokens: float, output_tokens: float) -> int:
        """The index, among all types, of the type of a request of this tier."""
        return self._places[self._own.kind(prompt_tokens, output_tokens)]

    def of(
        self, prompt_tokens: int, expected: OutputExpectation, limit: int | None = None
    ) -> tuple[float, ...]:
        """Probabilities of all types, in order; 0 for those of other tiers."""
        own = self._own.of(prompt_tokens, expected, limit)
        if len(own) == self._total:
            return own
        found = [0.0] * self._total
        for place, chance in zip(self._places, own, strict=True):
            found[place] = chance
        return tuple(found)


def types_by_tier(
    types: Sequence[PlannedType | WorkloadType],
    centres: Sequence[tuple[float, float]] | None = None,
) -> dict[str, TypesOfTier]:
    """The types of each tier; those of the tier "" are all if no type has a tier.

    ``centres``: (prompt, output) in tokens; by default the types' own lengths.
    """
    groups: dict[str, list[int]] = {}
    for place, kind in enumerate(types):
        groups.setdefault(kind.tier, []).append(place)
    if centres is None:
        centres = [(kind.prompt_tokens, kind.output_tokens) for kind in types]
    return {
        tier: TypesOfTier([centres[place] for place in places], places, len(centres))
        for tier, places in groups.items()
    }


def of_tier(types: Mapping[str, TypesOfTier], tier: str) -> TypesOfTier | None:
    """The types of a tier; of one that the plan does not know, those without a tier, or any."""
    found = types.get(tier) or types.get("")
    return found or next(iter(types.values()), None)
