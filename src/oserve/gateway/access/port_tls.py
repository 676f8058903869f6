"""TLS of the public port: a certificate and its key, read again when they change."""

import logging
import ssl
from pathlib import Path

from oserve.core import OServeError
from oserve.gateway.access.key_file import Stamp, stamp_of
from oserve.gateway.settings import TlsSettings

_log = logging.getLogger("oserve.gateway")


class PortTls:
    """The TLS context of the port. A renewed certificate holds for connections made after it.

    Raises OServeError if the files cannot be used.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._stamps = self._now()
        self._try(_context())
        self.context = _context()
        self._load(self.context)

    @classmethod
    def of_settings(cls, settings: TlsSettings) -> "PortTls | None":
        """The TLS that the settings ask for, if any."""
        if bool(settings.certificate_file) != bool(settings.key_file):
            raise OServeError(
                "certificate and key belong together, and one of them is missing",
                place="gateway.tls",
                remedy="set gateway.tls.certificate_file and gateway.tls.key_file, or neither",
            )
        if not settings.certificate_file:
            return None
        return cls(Path(settings.certificate_file), Path(settings.key_file))

    def check(self) -> None:
        """Use the files from now on if they have changed and fit together."""
        stamps = self._now()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            # A context that fails to load a pair may keep half of it.
            self._try(_context())
        except OServeError as error:
            _log.error("%s; the last certificate stays in force", error)
            return
        self._load(self.context)
        _log.info("the certificate was read again")

    def _now(self) -> tuple[Stamp | None, Stamp | None]:
        return stamp_of(self._files[0]), stamp_of(self._files[1])

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._files
        # An encrypted key must not make a server wait for somebody at a terminal.
        context.load_cert_chain(certificate, key, password="")

    def _try(self, context: ssl.SSLContext) -> None:
        try:
            self._load(context)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OServeError(
                f"certificate and key cannot be used: {reason}",
                place=f"gateway.tls: {self._files[0]}, {self._files[1]}",
                remedy="give PEM files of a certificate and of its key, without a passphrase",
            ) from None


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
