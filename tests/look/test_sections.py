"""The page's state: what a status document becomes, and that it stays small."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from look.scene import Fleet, decision
from oserve.control.decision import DecisionVerdict, Reason
from oserve.look.sections import (
    MOST_DEVICES,
    MOST_LINKS,
    MOST_REPLICAS,
    MOST_TYPES,
    page_state,
)
from oserve.look.words import REASONS, VERDICTS, standing, why


def test_every_reason_and_verdict_has_words() -> None:
    assert set(REASONS) == {item.value for item in Reason}
    assert set(VERDICTS) == {item.value for item in DecisionVerdict}


def test_a_decision_in_words() -> None:
    made = decision(1, 0.0, [], verdict="switch", reason="gain_exceeds_cost")
    assert why(made) == "switched: the gain exceeds the cost"


def test_standing_counts_by_phase() -> None:
    replicas = [{"phase": "ready"}, {"phase": "loading"}, {"phase": "standby"}]
    status = {"serving": True, "replicas": replicas, "given_up": {"r9": "died"}}
    assert standing(status) == (
        "Serving, with replicas given up: 1 replica ready, 2 loading, 1 given up"
    )
    assert standing({"serving": False, "replicas": []}) == "Not serving: 0 replicas ready"


def test_devices_are_grouped_by_node_and_replicas_point_at_them() -> None:
    fleet = Fleet()
    state = page_state(fleet.status(), [], {}, now_s=fleet.at_s)
    assert [(node.name, len(node.devices)) for node in state.nodes] == [("node0", 8), ("node1", 8)]
    assert state.replicas[0].devices == [0, 1]
    assert state.replicas[0].shape == "TP2 bf16"
    assert len(state.loads) == len(state.replicas)
    assert {link[0] for link in state.planned} == set(range(len(state.names)))


def test_the_start_of_a_phase_stands_still_between_readings() -> None:
    fleet = Fleet()
    status = fleet.status()
    first = page_state(status, [], {}, now_s=fleet.at_s)
    for item in status["replicas"]:
        item["phase_s"] += 1.0
    assert page_state(status, [], {}, now_s=fleet.at_s + 1.02).replicas == first.replicas


def test_a_switch_has_seconds_by_phase_and_what_its_decision_expected() -> None:
    fleet = Fleet()
    fleet.begin_switch()
    assert fleet.switch is not None
    for _ in range(6):
        fleet.at_s += 2.5
        fleet.next_phase()
    state = page_state(fleet.status(), [fleet.switch], {}, now_s=fleet.at_s)
    (found,) = state.switches
    assert found.state == "done"
    assert dict(found.phases) == {
        "prepare": 2.0,
        "start": 2.5,
        "copy": 2.5,
        "verify": 2.5,
        "commit": 2.5,
        "drain": 2.5,
    }
    assert (found.expected_gain, found.expected_cost, found.lasts_s) == (412.0, 18.0, 900.0)


def test_a_later_decision_for_the_same_plan_is_not_the_cause() -> None:
    fleet = Fleet()
    fleet.begin_switch()
    assert fleet.switch is not None
    fleet.at_s += 60.0
    fleet.decide(verdict="switch", reason="manual", gain_requests=1.0)
    state = page_state(fleet.status(), [fleet.switch], {}, now_s=fleet.at_s)
    assert state.switches[0].expected_gain == 412.0


def test_without_a_controller_the_types_are_those_of_the_plan() -> None:
    status = Fleet().status() | {"control": {"mode": "off"}}
    state = page_state(status, [], {}, now_s=0.0)
    assert [item.now_rps for item in state.types] == [-1.0] * len(state.names)
    assert (state.now.mode, state.decisions, state.ladder) == ("off", [], None)


@given(nodes=st.integers(0, 40), tiers=st.integers(1, 3), lengths=st.integers(1, 12))
def test_the_state_is_bounded(nodes: int, tiers: int, lengths: int) -> None:
    fleet = Fleet(nodes=nodes, tiers=tiers, lengths=lengths)
    status = fleet.status()
    state = page_state(status, [], {}, now_s=fleet.at_s)
    assert len(state.devices) == min(MOST_DEVICES, 8 * nodes)
    assert len(state.replicas) == min(MOST_REPLICAS, 6 * nodes)
    assert state.hidden == (
        max(0, 8 * nodes - MOST_DEVICES),
        max(0, len(status["replicas"]) - MOST_REPLICAS),
    )
    assert len(state.types) == min(MOST_TYPES, tiers * lengths)
    assert len(state.planned) <= MOST_LINKS
    places = range(len(state.devices))
    assert all(place in places for item in state.replicas for place in item.devices)
    assert len(msgspec.json.encode(state)) < 64_000
