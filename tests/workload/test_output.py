"""Expected output lengths: distributions, learning, limits."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.workload.output import KnownAtArrival, OutputEstimator, OutputExpectation


def learned(pairs: list[tuple[KnownAtArrival, int]]) -> OutputEstimator:
    estimator = OutputEstimator()
    for known, output in pairs:
        estimator.learn(known, output)
    return estimator


@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 10_000)), max_size=60),
    st.integers(1, 100_000),
    st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_it_is_a_distribution_within_the_limit(
    seen: list[tuple[int, int]], prompt: int, limit: int | None
) -> None:
    estimator = learned([(KnownAtArrival(prompt_tokens=p), o) for p, o in seen])
    found = estimator.expect(KnownAtArrival(prompt_tokens=prompt, max_tokens=limit))
    assert math.isclose(sum(found.probabilities), 1.0, rel_tol=1e-9)
    assert min(found.probabilities) >= 0.0
    assert found.mean_tokens >= 1.0 - 1e-9
    assert limit is None or found.mean_tokens <= limit + 1e-6
    assert found.quantile(0.1) <= found.quantile(0.9)
    assert found.beyond(50) > 50


def test_what_the_prompt_tells_is_learned() -> None:
    rng = random.Random(1)
    seen = []
    for _ in range(600):
        short = rng.random() < 0.5
        prompt = rng.randint(100, 140) if short else rng.randint(3000, 3400)
        output = rng.randint(380, 420) if short else rng.randint(18, 22)
        seen.append((KnownAtArrival(prompt_tokens=prompt), output))
    estimator = learned(seen)
    chat = estimator.expect(KnownAtArrival(prompt_tokens=120)).mean_tokens
    document = estimator.expect(KnownAtArrival(prompt_tokens=3200)).mean_tokens
    assert 360 < chat < 440
    assert 15 < document < 40


def asked(field: str, value: str) -> KnownAtArrival:
    return KnownAtArrival(
        prompt_tokens=300,
        tenant=value if field == "tenant" else "",
        system=value if field == "system" else "",
        session=value if field == "session" else "",
    )


@pytest.mark.parametrize("field", ["tenant", "system", "session"])
def test_whoever_asks_may_tell_more_than_the_prompt(field: str) -> None:
    rng = random.Random(2)
    seen = []
    for _ in range(800):
        brief = rng.random() < 0.5
        known = asked(field, "brief" if brief else "wordy")
        seen.append((known, rng.randint(8, 12) if brief else rng.randint(700, 900)))
    estimator = learned(seen)
    told = {who: estimator.expect(asked(field, who)).mean_tokens for who in ("brief", "wordy")}
    assert told["brief"] < 80
    assert told["wordy"] > 550


def test_a_new_habit_replaces_an_old_one() -> None:
    known = KnownAtArrival(prompt_tokens=300)
    estimator = learned([(known, 50)] * 4000 + [(known, 800)] * 6000)
    assert estimator.expect(known).mean_tokens > 700


def test_memory_is_bounded() -> None:
    estimator = OutputEstimator()
    for number in range(10_000):
        estimator.learn(KnownAtArrival(prompt_tokens=10, session=str(number)), 10)
    assert max(len(values) for values in estimator._views) == 4096


def test_an_answer_that_outgrows_its_expectation_is_expected_to_be_longer() -> None:
    known = KnownAtArrival(prompt_tokens=300)
    found = learned([(known, 10), (known, 1000)] * 200).expect(known)
    assert found.mean_tokens < 700
    assert found.beyond(20) > 800
    beyond_all = OutputExpectation(probabilities=(1.0,), lengths=(10.0,)).beyond(100)
    assert beyond_all > 100


def test_state_is_plain_and_restores() -> None:
    estimator = learned([(KnownAtArrival(prompt_tokens=p), 2 * p) for p in range(1, 300)])
    again = OutputEstimator.restored(estimator.state())
    known = KnownAtArrival(prompt_tokens=77)
    assert again.expect(known).mean_tokens == pytest.approx(estimator.expect(known).mean_tokens)
    with pytest.raises(ValueError, match="bins"):
        OutputEstimator.restored({**estimator.state(), "all": [1.0]})
