"""Patterns: seeded, and at each moment of the loads that were asked for."""

from collections import Counter

import pytest

from oserve.core import OServeError
from oserve.traces import CHANGING_TYPES, PATTERNS, synthesise_pattern

FIRST, SECOND = {"chat": 20.0, "answers": 10.0}, {"chat": 5.0, "documents": 15.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_rates_are_those_of_the_two_loads_mixed(name: str) -> None:
    part = PATTERNS[name]
    made = list(synthesise_pattern(part, FIRST, SECOND, duration_s=300.0, seed=3))
    assert made == list(synthesise_pattern(part, FIRST, SECOND, duration_s=300.0, seed=3))
    assert made != list(synthesise_pattern(part, FIRST, SECOND, duration_s=300.0, seed=4))
    counts = Counter(request.model for request in made)
    moments = [part((n + 0.5) / 300) for n in range(300)]
    for kind in CHANGING_TYPES:
        ends = FIRST.get(kind, 0.0), SECOND.get(kind, 0.0)
        expected = sum((1 - p) * ends[0] + p * ends[1] for p in moments)
        assert counts[kind] == pytest.approx(expected, abs=5 * expected**0.5)
    assert all(0.0 <= p <= 1.0 for p in moments)
    assert {round(p) for p in moments} == {0, 1}


def test_nonsense_is_refused() -> None:
    with pytest.raises(OServeError, match="there is no type"):
        synthesise_pattern(PATTERNS["step"], {"x": 1.0}, {}, duration_s=1.0, seed=0)
    with pytest.raises(OServeError, match="it is 0"):
        synthesise_pattern(PATTERNS["step"], FIRST, SECOND, duration_s=0.0, seed=0)
    assert not list(synthesise_pattern(PATTERNS["step"], {}, {}, duration_s=1.0, seed=0))
