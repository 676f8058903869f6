"""Where a replica answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a replica answers: a Unix socket or an ``http[s]://host:port[/path]`` base URL.

    ``caches``: the folder through which it gives up and takes in KV caches, if it can. ``headers``
    go with every request. ``health``: the path, from the server's root, that tells whether it is
    well; empty: to be found. ``ca_file``: certificates of the authorities that vouch for it.
    """

    url: str = ""
    unix_socket: str = ""
    api_key: str = ""
    caches: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    health: str = ""
    ca_file: str = ""
