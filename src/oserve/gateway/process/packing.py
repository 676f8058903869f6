"""Routing tables on their way to other nodes: without what is there already, and compressed.

Most of a table of many nodes is the certificates and tokens of their hatches, which hardly ever
change, while shares change every few seconds. So a table goes with keys of hatches, and each hatch
goes once.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import msgspec

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import HatchAddress

# Of a key's 128 bits, no two hatches of a cluster have the same.
_KEY_BYTES = 16
_LEVEL = 1

_TABLES: msgspec.json.Decoder[RoutingTable] = msgspec.json.Decoder(RoutingTable)

Hatches = dict[str, HatchAddress]


class PackedTable:
    """A table as it is sent: ``text``, and the ``hatches`` that its keys stand for."""

    def __init__(self, table: RoutingTable) -> None:
        self.hatches: Hatches = {}
        keys: dict[HatchAddress, str] = {}
        replicas = tuple(self._without(item, keys) for item in table.replicas)
        plain = msgspec.json.encode(replace(table, replicas=replicas))
        self.text = zlib.compress(plain, _LEVEL)

    def _without(self, replica: TableReplica, keys: dict[HatchAddress, str]) -> TableReplica:
        hatch = replica.endpoint.hatch
        if hatch is None:
            return replica
        key = keys.get(hatch)
        if key is None:
            key = keys[hatch] = _key(hatch)
            self.hatches[key] = hatch
        stand_in = HatchAddress(host="", port=0, certificate=key, token="")
        return replace(replica, endpoint=replace(replica.endpoint, hatch=stand_in))

    def missing(self, known: Iterable[str]) -> Hatches:
        """Those that a process lacks which has the ones with the keys ``known``."""
        there = set(known)
        return {key: hatch for key, hatch in self.hatches.items() if key not in there}


def unpacked(text: bytes, hatches: Mapping[str, HatchAddress]) -> tuple[RoutingTable, Hatches]:
    """The table, and those of the hatches that it uses. Raises ValueError if it cannot be read."""
    used: Hatches = {}

    def with_hatch(replica: TableReplica) -> TableReplica:
        stand_in = replica.endpoint.hatch
        if stand_in is None:
            return replica
        key = stand_in.certificate
        if key not in hatches:
            raise ValueError("the table names a hatch that is unknown here")
        used[key] = hatches[key]
        return replace(replica, endpoint=replace(replica.endpoint, hatch=hatches[key]))

    try:
        table = _TABLES.decode(zlib.decompress(text))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return replace(table, replicas=tuple(with_hatch(item) for item in table.replicas)), used


def _key(hatch: HatchAddress) -> str:
    facts = (hatch.host, hatch.port, hatch.certificate, hatch.token)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=_KEY_BYTES).hexdigest()
