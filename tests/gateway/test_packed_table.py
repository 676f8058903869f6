"""A routing table on its way to gateway processes."""

from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, HatchAddress, ReplicaPhase
from oserve.gateway.process.packed_table import PackedTable, packed

HATCHES = [
    HatchAddress(host=f"10.0.0.{n}", port=7443, certificate=f"PEM {n}" * 100, token=f"secret-{n}")
    for n in range(4)
]
REPLICA = TableReplica(
    id="",
    shape="tp1",
    phase=ReplicaPhase.READY,
    endpoint=Endpoint(),
    max_inflight=1,
    max_model_len=1,
    accepts_priority=True,
    returns_token_ids=True,
    prefill_s_per_token=1.0,
    decode_s_per_token=1.0,
)


def table_of(places: list[int | None]) -> RoutingTable:
    replicas = tuple(
        replace(
            REPLICA,
            id=f"r{n}",
            endpoint=Endpoint(
                unix_socket=f"r{n}/api.sock", hatch=None if place is None else HATCHES[place]
            ),
        )
        for n, place in enumerate(places)
    )
    return RoutingTable(plan_id="p", length_classes=(), routing_shares={}, replicas=replicas)


@given(st.lists(st.none() | st.integers(0, len(HATCHES) - 1), max_size=12))
def test_a_table_arrives_as_it_was_and_each_hatch_is_sent_once(places: list[int | None]) -> None:
    table = table_of(places)
    sent = msgspec.json.encode(packed(table))
    assert msgspec.json.decode(sent, type=PackedTable).unpacked() == table
    for n, hatch in enumerate(HATCHES):
        assert sent.count(hatch.token.encode()) == (n in places)


def test_no_token_is_shown() -> None:
    assert "secret" not in repr(packed(table_of([0, 1])))
