"""Chances of types follow from the expected answer."""

import math

from hypothesis import given
from hypothesis import strategies as st

from oserve.workload.output import KnownAtArrival, OutputEstimator
from oserve.workload.type_probabilities import TypeProbabilities

CENTRES = [(50.0, 40.0), (60.0, 600.0), (3000.0, 50.0), (4000.0, 900.0)]


@given(st.integers(1, 50_000), st.one_of(st.none(), st.integers(1, 4000)))
def test_they_are_chances_and_respect_the_limit(prompt: int, limit: int | None) -> None:
    kinds = TypeProbabilities(CENTRES)
    known = KnownAtArrival(prompt_tokens=prompt, max_tokens=limit)
    probabilities = kinds.of(prompt, OutputEstimator(500.0).expect(known), limit)
    assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-9)
    assert min(probabilities) >= 0
    if limit is not None and limit <= 2:
        assert max(probabilities) > 1 - 1e-9


def test_what_was_learned_shows() -> None:
    kinds = TypeProbabilities(CENTRES)
    estimator = OutputEstimator()
    known = KnownAtArrival(prompt_tokens=55)
    for _ in range(300):
        estimator.learn(known, 640)
    probabilities = kinds.of(55, estimator.expect(known))
    assert probabilities[1] > 0.9
    assert kinds.kind(55, 640) == 1
    assert kinds.kind(3500, 60) == 2
