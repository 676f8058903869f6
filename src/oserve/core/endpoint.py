"""The endpoint of a replica."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HatchAddress:
    """The TLS port of a node, behind which its private sockets lie; see ``wire.hatch``.

    ``certificate``: the node's own certificate (PEM), the only one that a client accepts.
    ``token``: the secret of the run, which a client proves that it knows.
    """

    host: str
    port: int
    certificate: str = field(repr=False)
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The address of a replica: a Unix socket or an ``http[s]://host:port[/path]`` base URL.

    ``caches``: the folder through which the replica exports and imports KV caches; empty if it
    cannot. ``headers`` go with every request. ``health``: the path of the health check from the
    server's root; empty: OServe probes for it. ``ca_file``: trusted CA certificates (PEM).
    ``hatch``: of a replica on another node; ``unix_socket`` is then the name behind that hatch.
    """

    url: str = ""
    unix_socket: str = ""
    api_key: str = ""
    caches: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    health: str = ""
    ca_file: str = ""
    hatch: HatchAddress | None = None
