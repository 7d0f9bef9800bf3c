"""The identity of an installation: an Ed25519 key pair in a file that only its owner may read.

Made on first use, whole or not at all: two processes that begin together end with the same one. A file that others may
read is refused, not mended: who has read it before the mode was changed has the key.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pyccl._proto import limits
from pyccl.errors import UsageError

VARIABLE: Final = "PYCCL_IDENTITY"
_FILE_BYTES_MAX: Final = 4096
_PEER_CONTEXT: Final = b"pyccl peer 1"
_RUN_KEY_CONTEXT: Final = b"pyccl run key 1"
# What is checked is the key; a certificate only carries it, and no clock decides whether it does.
_VALID: Final = (datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC), datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC))


class Identity:
    """public: 32 bytes, which others know it by."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public: Final = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({short(self.public)})"

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def run_key(self) -> bytes:
        """What a master of this identity seals invites with."""
        kdf = HKDF(hashes.SHA256(), limits.KEY_BYTES, salt=None, info=_RUN_KEY_CONTEXT)
        return kdf.derive(self._key.private_bytes_raw())

    def certificate(self) -> bytes:
        """Key and self-signed certificate, PEM."""
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pyccl")])
        builder = x509.CertificateBuilder(name, name, self._key.public_key(), 1, *_VALID)
        return self._pem() + builder.sign(self._key, None).public_bytes(serialization.Encoding.PEM)

    def _pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @classmethod
    def new(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path | None = None) -> Identity:
        """The one in this file, made if there is none. None: $PYCCL_IDENTITY, or where XDG says.

        UsageError: others may read it, it is no such key, or it can't be read or made.
        """
        path = path or default_path()
        try:
            with contextlib.suppress(FileNotFoundError):
                return cls(_read(path))
            _make(path)
            return cls(_read(path))
        except OSError as e:
            raise UsageError(f"identity {path}: {e.strerror}") from e


def default_path() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return config / "pyccl" / "identity.pem"


def short(public: bytes) -> str:
    return public.hex()[:16]


def peer_id(public: bytes, salt: bytes) -> bytes:
    """The id of a peer of this identity: nobody else can prove to have it. The salt tells several apart."""
    return hashlib.sha256(_PEER_CONTEXT + public + salt).digest()[: limits.ID_BYTES]


def is_signed(public: bytes, signature: bytes, data: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def key_of_certificate_untrusted(der: bytes) -> bytes | None:
    """The Ed25519 key that a certificate carries."""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        return None
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else None


def _read(path: Path) -> Ed25519PrivateKey:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"identity {path}: not a file")
        if mode & 0o077:
            raise UsageError(
                f"identity {path}: mode {stat.S_IMODE(mode):04o} lets others read or change the key; if nobody has, "
                f"chmod 600 it, else remove it, and a new one will be made"
            )
        data = os.read(fd, _FILE_BYTES_MAX)
    finally:
        os.close(fd)
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # and what the library says of it is not repeated: it is about a secret
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"identity {path}: no Ed25519 private key (PEM, PKCS 8, without a password)")
    return key


def _make(path: Path) -> None:
    """Durable when it returns; one that somebody else made meanwhile stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(Identity.new()._pem())
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
