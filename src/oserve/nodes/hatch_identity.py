"""Certificate, key and token of a hatch, made for one run or kept in private files."""

import datetime
import os
import secrets
import ssl
import stat
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from oserve.core import OServeError
from oserve.nodes.hatch_messages import HatchIdentity
from oserve.wire.hatch import HatchError, pinned_context

_HATCH_IDENTITY_DECODER = msgspec.json.Decoder(HatchIdentity)

_TOKEN_BYTES = 32
# The client trusts this one certificate, whatever the clocks of the two nodes say. RFC 5280 gives
# the second of these for "no end".
_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_TO = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


def make_identity(node: str) -> HatchIdentity:
    """A new certificate (P-256, self-signed, no authority), its key, and a token of 256 bits."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"oserve {node}"[:64])])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_TO)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(key, hashes.SHA256())
    )
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return HatchIdentity(
        certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key=text.decode(),
        token=secrets.token_hex(_TOKEN_BYTES),
    )


def stored_identity(file: Path, node: str) -> HatchIdentity:
    """The identity kept in this file, which is made if it is not there. Raises OServeError."""
    try:
        mode = file.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise OServeError(
                "other users can read the private key of this node",
                place=str(file),
                remedy="remove the file; a new key and token are made at the next start",
            )
        return _HATCH_IDENTITY_DECODER.decode(file.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, msgspec.DecodeError) as error:
        raise OServeError(
            f"the private key of this node cannot be read: {error}",
            place=str(file),
            remedy="remove the file; a new key and token are made at the next start",
        ) from None
    made = make_identity(node)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(file, msgspec.json.encode(made))
    return made


def write_private(file: Path, content: bytes) -> None:
    """Write a file that only this user reads; others see the old content or the new."""
    fresh = file.with_name(file.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        target.write(content)
    os.replace(fresh, file)


def serving_context(identity: HatchIdentity) -> ssl.SSLContext:
    """The context of a hatch. Raises OServeError if key and certificate do not belong together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Connections live long, and a ticket that is never read can turn an end into a reset.
    context.num_tickets = 0
    # The library reads files only: this one is in memory.
    held = os.memfd_create("hatch", os.MFD_CLOEXEC)
    try:
        os.write(held, f"{identity.key}\n{identity.certificate}".encode())
        pinned_context(identity.certificate)
        context.load_cert_chain(f"/proc/self/fd/{held}")
    except (ssl.SSLError, HatchError):
        raise OServeError(
            "certificate and key of the hatch cannot be used together",
            place="hatch",
            remedy="let OServe make both",
        ) from None
    finally:
        os.close(held)
    return context
