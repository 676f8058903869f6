"""Which nodes get gateway processes, and which addresses they can have."""

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from oserve.core import NodePhase, NodeState, OServeError
from oserve.engines.group import boot_id
from oserve.engines.keeper_messages import NodeFacts
from oserve.gateway.process.supervisor import GatewaySupervisor
from oserve.gateway.settings import GatewaySettings
from oserve.startup.gateways import NodeGatewayKeepers, check_gateway
from oserve.startup.node_fleet import NodeFleet


@pytest.mark.parametrize("host", ["10.0.0.1", "server.example", "fd00::1"])
def test_an_address_of_one_machine_is_refused_for_all(host: str) -> None:
    with pytest.raises(OServeError) as refused:
        check_gateway(GatewaySettings(host=host, placement="every-node"))
    assert (refused.value.place, host in refused.value.message) == ("gateway.host", True)
    check_gateway(GatewaySettings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::", "localhost"])
def test_an_address_that_every_machine_has_is_not(host: str) -> None:
    check_gateway(GatewaySettings(host=host, placement="every-node"))


@dataclass
class Held:
    node: str
    facts: NodeFacts


@dataclass
class Fleet:
    joined: list[Held]


@dataclass
class Supervisor:
    calls: list[tuple[list[str], list[str]]] = field(default_factory=list)
    keepers: list[Any] = field(default_factory=list)

    def follow(self, keepers: Mapping[str, Any], leaving: Collection[str]) -> None:
        self.calls.append((sorted(keepers), sorted(leaving)))
        self.keepers.append(dict(keepers))


def held(name: str) -> Held:
    return Held(name, NodeFacts(python="/python", boot=f"boot {name}", host=name))


def test_nodes_in_reach_that_are_not_this_machine_have_gateways() -> None:
    here = Held("here", NodeFacts(python="/python", boot=boot_id(), host=socket.gethostname()))
    unknown = Held("unknown", NodeFacts())
    names = ("up", "cordoned", "held_down", "draining", "silent", "lost")
    fleet = Fleet([here, unknown, *map(held, names)])
    found = Supervisor()
    told = NodeGatewayKeepers(cast(NodeFleet, fleet), cast(GatewaySupervisor, found))
    states = [NodeState(name=name, phase=NodePhase(name)) for name in names]
    states[3] = NodeState(name="draining", phase=NodePhase.DRAINING, word="draining")
    states += [NodeState(name=name) for name in ("here", "unknown", "elsewhere")]
    told.follow(states)
    told.follow(states)
    assert found.calls == [(["cordoned", "draining", "held_down", "up"], ["draining"])] * 2
    # The same ones each time: what runs is known by them.
    assert found.keepers[0] == found.keepers[1]
    NodeGatewayKeepers(None, cast(GatewaySupervisor, found)).follow(states)
    assert len(found.calls) == 2


def test_two_processes_cannot_share_a_unix_socket() -> None:
    with pytest.raises(OServeError, match="2 gateway processes"):
        check_gateway(GatewaySettings(unix_socket="/oserve.sock", processes=2))
    check_gateway(GatewaySettings(unix_socket="/oserve.sock"))
