"""The order of waiting requests: short first, bounded ageing, clients heard within bounds."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.order import OrderPolicy, engine_priority, rank_s

policies = st.builds(
    OrderPolicy,
    penalty_s_per_token=st.floats(0, 1),
    max_penalty_s=st.floats(0, 100),
    client_step_s=st.floats(0, 5),
    max_client_steps=st.integers(0, 20),
    freshest_first_s=st.sampled_from([0.0, 1.0, 60.0]),
)
tokens = st.integers(1, 200_000)
clients = st.integers(-1000, 1000)


@given(policies, st.floats(0, 1e6), tokens, tokens, clients, clients)
def test_nothing_starves(
    policy: OrderPolicy, arrival_s: float, mine: int, other: int, my_wish: int, its_wish: int
) -> None:
    """Whoever arrives later than the bound cannot pass, whatever its length and wish."""
    bound_s = policy.max_penalty_s + 2 * policy.max_client_steps * policy.client_step_s
    bound_s += 2 * policy.freshest_first_s
    me = rank_s(policy, arrival_s=arrival_s, prompt_tokens=mine, client_priority=my_wish)
    late = rank_s(
        policy,
        arrival_s=arrival_s + bound_s + 1.0,
        prompt_tokens=other,
        client_priority=its_wish,
    )
    assert me < late
    assert engine_priority(me) <= engine_priority(late)


@given(policies, st.floats(0, 1e6), tokens, tokens)
def test_of_two_that_arrive_together_the_shorter_goes_first(
    policy: OrderPolicy, arrival_s: float, one: int, two: int
) -> None:
    short, long = sorted((one, two))
    assert rank_s(policy, arrival_s=arrival_s, prompt_tokens=short) <= rank_s(
        policy, arrival_s=arrival_s, prompt_tokens=long
    )


def test_within_a_window_the_freshest_goes_first() -> None:
    policy = OrderPolicy(freshest_first_s=10.0)
    arrivals = [0.0, 4.0, 9.9, 10.0, 19.0, 21.0]
    ranks = [rank_s(policy, arrival_s=at, prompt_tokens=100) for at in arrivals]
    order = sorted(range(6), key=lambda place: ranks[place])
    assert order == [2, 1, 0, 4, 3, 5]
