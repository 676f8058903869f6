"""Tables arrive on other nodes as they were sent, and each hatch goes there once."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.conftest import table_of, table_replica
from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.core import Endpoint, HatchAddress
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.messages import HubReply, WorkerReport
from oserve.gateway.process.packed_table import packed
from oserve.gateway.process.sent_table import Hatches, SentTable, received
from oserve.gateway.snapshot import ClusterSnapshot


def hatch_of(number: int) -> HatchAddress:
    return HatchAddress(host=f"h{number}", port=number, certificate=f"c{number % 3}", token="t")


def table_on(nodes: list[int | None]) -> RoutingTable:
    replicas = [
        table_replica(
            f"r{index}",
            "" if node is not None else "http://127.0.0.1:1",
            **(
                {}
                if node is None
                else {"endpoint": Endpoint(unix_socket="e/api.sock", hatch=hatch_of(node))}
            ),
        )
        for index, node in enumerate(nodes)
    ]
    return (
        table_of(*replicas) if replicas else replace(table_of(table_replica("r", "")), replicas=())
    )


tables = st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=6).map(table_on)


@given(st.lists(tables, min_size=1, max_size=5))
def test_every_table_arrives_and_a_hatch_that_is_known_does_not_go_again(
    script: list[RoutingTable],
) -> None:
    known: Hatches = {}
    for table in script:
        sent = SentTable(packed(table))
        missing = sent.missing(known)
        assert not missing.keys() & known.keys()
        arrived, known = received(sent.text, known | missing)
        assert arrived == table
        assert set(known.values()) == {
            item.endpoint.hatch for item in table.replicas if item.endpoint.hatch is not None
        }


def test_a_table_of_unknown_hatches_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown here"):
        received(SentTable(packed(table_on([1]))).text, {})
    with pytest.raises(ValueError, match="incorrect header"):
        received(b"no table", {})


def reply_to(hub: Hub, version: int) -> HubReply:
    report = WorkerReport(
        incarnation=1 << 40,
        counts=Batch(),
        outstanding={},
        metrics=None,
        queued=0,
        table=version,
        keeps_hatches=True,
    )
    return hub.reply(report, "a")


def test_the_hub_sends_what_a_process_lacks_and_all_to_a_new_one() -> None:
    hub = Hub()
    known: Hatches = {}
    hub.publish(table_on([1, 2]), ClusterSnapshot())
    first = reply_to(hub, 0)
    assert first.table is None
    table, known = received(first.sent_table, known | first.hatches)
    assert table == table_on([1, 2])
    assert reply_to(hub, first.version).sent_table == b""
    hub.publish(table_on([2, 3]), ClusterSnapshot())
    second = reply_to(hub, first.version)
    assert list(second.hatches.values()) == [hatch_of(3)]
    table, known = received(second.sent_table, known | second.hatches)
    assert table == table_on([2, 3])
    # One that has lost its table, and one of another server, get all of it.
    for hubs in (hub, Hub()):
        hubs.publish(table_on([2, 3]), ClusterSnapshot())
        assert len(reply_to(hubs, 0 if hubs is hub else second.version).hatches) == 2
