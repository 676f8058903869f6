"""The endpoint of a replica."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The address of a replica: a Unix socket or an ``http[s]://host:port[/path]`` base URL.

    ``caches``: the folder through which the replica exports and imports KV caches; empty if it
    cannot. ``headers`` go with every request. ``health``: the path of the health check from the
    server's root; empty: OServe probes for it. ``ca_file``: trusted CA certificates (PEM).
    """

    url: str = ""
    unix_socket: str = ""
    api_key: str = ""
    caches: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    health: str = ""
    ca_file: str = ""
