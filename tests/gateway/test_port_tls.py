"""TLS on the gateway's port: HTTPS only, a renewed pair is followed, a broken one is not."""

import asyncio
import ssl
from pathlib import Path

import pytest

from oserve.core import OServeError
from oserve.gateway.access.port_tls import PortTls
from oserve.gateway.http import server
from oserve.gateway.settings import GatewaySettings, TlsSettings
from oserve.nodes.hatch_identity import make_identity
from oserve.sim.engine import EmulatedEngine

from .conftest import Make

OLD, NEW = make_identity("old"), make_identity("new")


def stored(folder: Path, certificate: str, key: str) -> TlsSettings:
    (folder / "cert.pem").write_text(certificate)
    (folder / "key.pem").write_text(key)
    return TlsSettings(certificate_file=str(folder / "cert.pem"), key_file=str(folder / "key.pem"))


async def shown(port: int) -> str:
    """The certificate that a new connection is shown (PEM), over which a request is answered."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    finally:
        writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(found)


async def test_a_renewed_certificate_is_followed_and_a_broken_one_is_not(
    make_front: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server, "FOLLOW_INTERVAL_S", 0.005)
    tls = stored(tmp_path, OLD.certificate, OLD.key)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, tls=tls)
    front = await make_front(EmulatedEngine(), settings=settings)
    port = int(front.url.rpartition(":")[2])
    assert await shown(port) == OLD.certificate
    # One half is renewed before the other.
    stored(tmp_path, NEW.certificate, OLD.key)
    async with asyncio.timeout(60.0):
        while "the last certificate stays in force" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert await shown(port) == OLD.certificate
        stored(tmp_path, NEW.certificate, NEW.key)
        while await shown(port) != NEW.certificate:
            pass
    # Plain HTTP is not answered.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
    try:
        assert b"200" not in await reader.read()
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


def test_files_that_cannot_be_used_are_told_of_at_the_start(tmp_path: Path) -> None:
    tls = stored(tmp_path, NEW.certificate, OLD.key)
    with pytest.raises(OServeError, match="cannot be used"):
        PortTls.of_settings(tls)
    with pytest.raises(OServeError, match="belong together"):
        PortTls.of_settings(TlsSettings(certificate_file=tls.certificate_file))
    assert PortTls.of_settings(TlsSettings()) is None
