"""The server side: a listening socket and its open connections."""

import asyncio
import socket
import ssl

from oserve.wire.connection import (
    Connections,
    Handler,
    RefusalHandler,
    ServerConnection,
    ServerLimits,
)


class HttpServer:
    """A listening server; ``close`` ends it and every connection."""

    def __init__(self, server: asyncio.AbstractServer, connections: Connections) -> None:
        self._server = server
        self._connections = connections

    @property
    def port(self) -> int:
        """The TCP port bound (0 for a Unix socket)."""
        sockets = getattr(self._server, "sockets", ())
        name = sockets[0].getsockname() if sockets else ""
        return int(name[1]) if isinstance(name, tuple) else 0

    def stop_listening(self) -> None:
        self._server.close()
        for connection in list(self._connections.open):
            connection.shut()

    async def close(self) -> None:
        self._server.close()
        for connection in list(self._connections.open):
            connection.abort()
        await self._server.wait_closed()


async def serve(
    handler: Handler,
    *,
    refuse: RefusalHandler,
    limits: ServerLimits,
    host: str = "127.0.0.1",
    port: int = 0,
    unix_socket: str = "",
    reuse_port: bool = False,
    tls: ssl.SSLContext | None = None,
) -> HttpServer:
    """Listen on a TCP port, with ``tls`` if given, or on a Unix socket.

    ``handler`` is called with each request, ``refuse`` to answer one that breaks a limit (its
    connection closes afterwards); neither may block.
    """
    loop = asyncio.get_running_loop()
    connections = Connections(handler, refuse, limits)
    factory = lambda: ServerConnection(connections)  # noqa: E731
    if unix_socket:
        server = await loop.create_unix_server(factory, unix_socket, backlog=1024)
    else:
        server = await loop.create_server(
            factory,
            host,
            port,
            reuse_port=reuse_port or None,
            backlog=4096,
            family=socket.AF_UNSPEC,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else limits.read_timeout_s,
        )
    return HttpServer(server, connections)
