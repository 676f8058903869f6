"""What a gateway process on another node knows of its node."""

from dataclasses import replace

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.gateway.process.messages import GatewayHome


def localised(table: RoutingTable, home: GatewayHome | None) -> RoutingTable:
    """The same table, in which engines of the process's own node have their sockets there.

    An endpoint is of that node if its hatch shows the node's certificate: addresses may change.
    """
    if home is None:
        return table
    return replace(table, replicas=tuple(_localised(item, home) for item in table.replicas))


def _localised(replica: TableReplica, home: GatewayHome) -> TableReplica:
    endpoint = replica.endpoint
    if endpoint.hatch is None or endpoint.hatch.certificate != home.certificate:
        return replica
    path = f"{home.folder}/{endpoint.unix_socket}"
    return replace(replica, endpoint=replace(endpoint, unix_socket=path, hatch=None))
