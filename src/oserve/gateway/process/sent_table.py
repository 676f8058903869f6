"""Routing tables on their way to other nodes: compressed, and each hatch goes to a process once.

Most of a table of many nodes is the certificates and tokens of their hatches, which hardly ever
change, while shares change every few seconds.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.core import HatchAddress
from oserve.gateway.process.packed_table import PackedTable

# Of a key's 128 bits, no two hatches of a cluster have the same.
_KEY_BYTES = 16
_LEVEL = 1

Hatches = dict[str, HatchAddress]


class _Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A packed table with the keys of its hatches in place of them."""

    table: RoutingTable
    at: tuple[int, ...]
    keys: tuple[str, ...]


_SENT: msgspec.json.Decoder[_Sent] = msgspec.json.Decoder(_Sent)


class SentTable:
    """A table as it is sent: ``text``, and the ``hatches`` that its keys stand for."""

    def __init__(self, packed: PackedTable) -> None:
        self.hatches: Hatches = {_key(hatch): hatch for hatch in packed.hatches}
        sent = _Sent(table=packed.table, at=packed.at, keys=tuple(self.hatches))
        self.text = zlib.compress(msgspec.json.encode(sent), _LEVEL)

    def missing(self, known: Iterable[str]) -> Hatches:
        """Those that a process lacks which has the ones with the keys ``known``."""
        there = set(known)
        return {key: hatch for key, hatch in self.hatches.items() if key not in there}


def received(text: bytes, hatches: Mapping[str, HatchAddress]) -> tuple[RoutingTable, Hatches]:
    """The table, and those of the hatches that it uses. Raises ValueError if it cannot be read."""
    try:
        sent = _SENT.decode(zlib.decompress(text))
        used = {key: hatches[key] for key in sent.keys}
        packed = PackedTable(table=sent.table, hatches=tuple(used.values()), at=sent.at)
        return packed.unpacked(), used
    except KeyError:
        raise ValueError("the table names a hatch that is unknown here") from None
    except (zlib.error, IndexError) as error:
        raise ValueError(str(error)) from None


def _key(hatch: HatchAddress) -> str:
    facts = (hatch.host, hatch.port, hatch.certificate, hatch.token)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=_KEY_BYTES).hexdigest()
