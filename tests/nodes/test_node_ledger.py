"""What a Ray helper makes of Ray's lists and agents' answers."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.core import Device, HatchAddress
from oserve.engines.keeper_messages import NodeFacts
from oserve.nodes.agent_messages import NodeRefusal, NodeReport
from oserve.nodes.node_ledger import (
    NodeLedger,
    NodeNames,
    RayNode,
    offered_devices,
    other_agents,
    plain_name,
)
from oserve.nodes.ray_messages import NodeFound, NodeLost, NodeRefused

SLOTS = {"oserve_slot": 2.0}


def node(key: str, host: str = "a", address: str = "10.0.0.1", **named: object) -> RayNode:
    return RayNode(id=key, host=host, address=address, **{"resources": SLOTS, **named})  # type: ignore[arg-type]


def report(name: str, port: int = 1) -> NodeReport:
    return NodeReport(
        node=name,
        hatch=HatchAddress(host="10.0.0.1", port=port, certificate="", token="secret"),
        devices=(Device(id="cpu:0", kind="cpu"),),
        facts=NodeFacts(host=name),
    )


def ledger() -> NodeLedger:
    return NodeLedger(refuse_s=60.0)


def test_a_node_is_found_once_and_again_when_its_report_changes() -> None:
    book = ledger()
    assert book.observe([node("1")], 0.0) == []
    assert not book.settled
    [found] = book.answered("1", report("a"))
    assert isinstance(found, NodeFound)
    assert (found.name, found.resources) == ("a", SLOTS)
    assert book.settled
    assert book.answered("1", report("a")) == []
    assert len(book.answered("1", report("a", port=2))) == 1


def test_a_node_is_lost_with_rays_reason_and_keeps_its_name_when_it_is_back() -> None:
    book = ledger()
    book.observe([node("1"), node("2", "b", "10.0.0.2")], 0.0)
    book.answered("1", report("a"))
    dead = node("1", alive=False, reason="health check failed")
    [lost] = book.observe([dead, node("2", "b", "10.0.0.2")], 1.0)
    assert lost == NodeLost(name="a", id="1", reason="health check failed")
    # Its next life is another node to Ray; the dead one stays on the list.
    assert book.observe([dead, node("3"), node("2", "b", "10.0.0.2")], 2.0) == []
    [found] = book.answered("3", report("a"))
    assert isinstance(found, NodeFound)
    assert (found.name, found.id) == ("a", "3")
    # A late answer of the earlier life says nothing.
    assert book.answered("1", report("a", port=9)) == []


def test_a_node_that_ray_has_forgotten_is_lost() -> None:
    book = ledger()
    book.observe([node("1")], 0.0)
    book.answered("1", report("a"))
    [lost] = book.observe([], 1.0)
    assert isinstance(lost, NodeLost)
    assert "does not list" in lost.reason


def test_nodes_that_offer_nothing_are_not_for_oserve() -> None:
    book = ledger()
    head = node("1", resources={"CPU": 8.0})
    gpus = node("2", "b", "10.0.0.2", resources={"GPU": 8.0, "CPU": 64.0})
    book.observe([head, gpus], 0.0)
    assert set(book.living()) == {"2"}
    assert gpus.offered == {"GPU": 8.0}


def test_silence_of_an_agent_counts_only_before_its_first_report_and_after_a_while() -> None:
    book = ledger()
    book.observe([node("1"), node("2", "b", "10.0.0.2")], 0.0)
    book.answered("1", report("a"))
    assert book.unanswered("1", "why", "what", 1000.0) == []
    assert book.unanswered("2", "why", "what", 59.0) == []
    [refused] = book.unanswered("2", "why", "what", 60.0)
    assert refused == NodeRefused(name="b", id="2", reason="why", remedy="what")
    assert book.unanswered("2", "why", "what", 61.0) == []
    assert book.settled
    assert len(book.answered("2", report("b"))) == 1


def test_a_refusal_is_told_once() -> None:
    book = ledger()
    book.observe([node("1")], 0.0)
    refusal = NodeRefusal(node="a", reason="another version", remedy="install it")
    assert len(book.answered("1", refusal)) == 1
    assert book.answered("1", refusal) == []


def test_machines_that_share_a_host_name_get_the_end_of_their_address() -> None:
    names = NodeNames()
    twins = [node("1", "gpu", "10.0.0.7"), node("2", "gpu", "10.0.0.8"), node("3", "x", "10.0.0.9")]
    names.add(twins)
    assert [names.name(item) for item in twins] == ["gpu-7", "gpu-8", "x"]
    # One that comes later does not rename those that were there.
    late = node("4", "x", "10.0.1.9")
    names.add([late])
    assert [names.name(twins[2]), names.name(late)] == ["x", "x-9"]


@given(st.lists(st.tuples(st.text(max_size=8), st.sampled_from("1234"), st.sampled_from("12"))))
def test_names_are_plain_unique_and_stay(machines: list[tuple[str, str, str]]) -> None:
    names = NodeNames()
    seen: dict[tuple[str, str], str] = {}
    for host, end, net in machines:
        item = node("1", host, f"10.0.{net}.{end}")
        names.add([item])
        name = names.name(item)
        assert seen.setdefault((item.host, item.address), name) == name
        assert plain_name(name) == name
    assert len(set(seen.values())) == len(seen)


def test_what_ray_lists_can_be_planned_for() -> None:
    gpus = {"GPU": 2.0, "accelerator_type:H100": 1.0}
    nodes = [
        node("1", "b", "10.0.0.2", resources=gpus),
        node("2", resources={"oserve_slot": 2.0, "memory": 8e9}),
        node("3", "c", "10.0.0.3", resources={"CPU": 8.0}),
        node("4", "d", "10.0.0.4", alive=False, resources=gpus),
    ]
    found = offered_devices(nodes)
    assert [(one.id, one.kind, one.node) for one in found] == [
        ("a/cpu:0", "cpu", "a"),
        ("a/cpu:1", "cpu", "a"),
        ("b/gpu:0", "H100", "b"),
        ("b/gpu:1", "H100", "b"),
    ]
    assert found[0].memory_bytes == 4_000_000_000


def test_agents_of_other_servers_are_told_from_ours_and_from_other_actors() -> None:
    named = [
        {"name": "agent-1", "namespace": "oserve-a"},
        {"name": "agent-2", "namespace": "oserve-b"},
        {"name": "agent-3", "namespace": "somebody"},
        {"name": "trainer", "namespace": "oserve-b"},
    ]
    assert other_agents(named, "oserve-a") == {"2": "oserve-b"}


def test_an_agent_that_waits_for_another_server_s_is_refused_sooner() -> None:
    book = ledger()
    book.observe([node("1")], 0.0)
    assert book.unanswered("1", "held", "wait", 9.0) == []
    assert book.unanswered("1", "theirs", "stop it", 7.0, after_s=8.0) == []
    [event] = book.unanswered("1", "theirs", "stop it", 9.0, after_s=8.0)
    assert isinstance(event, NodeRefused)
    assert book.settled
