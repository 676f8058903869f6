"""How aiohttp reaches an engine: its Unix socket, that socket behind a hatch, or its URL."""

import ssl
from typing import cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace

from oserve.core import Endpoint, HatchAddress
from oserve.wire.hatch import HatchError, connect_hatch


class HatchConnector(aiohttp.BaseConnector):
    """Connections through a hatch to one socket behind it."""

    def __init__(self, address: HatchAddress, name: str, *, limit: int) -> None:
        super().__init__(limit=limit)
        self._address = address
        self._name = name

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        """As aiohttp's own connector for Unix sockets; the method that subclasses implement."""
        del req, traces, timeout  # ``connect_hatch`` has a limit of its own
        try:
            _, protocol = await connect_hatch(self._loop, self._factory, self._address, self._name)
        except HatchError as error:
            raise aiohttp.ClientConnectionError(str(error)) from None
        return cast(ResponseHandler, protocol)


def connector_of(endpoint: Endpoint, *, limit: int = 100) -> aiohttp.BaseConnector:
    """A connector to this endpoint; ``limit``: connections at once, 0 for any number."""
    if endpoint.hatch is not None:
        return HatchConnector(endpoint.hatch, endpoint.unix_socket, limit=limit)
    if endpoint.unix_socket:
        return aiohttp.UnixConnector(path=endpoint.unix_socket, limit=limit)
    if endpoint.ca_file:
        tls = ssl.create_default_context(cafile=endpoint.ca_file)
        return aiohttp.TCPConnector(limit=limit, ssl=tls)
    return aiohttp.TCPConnector(limit=limit)
