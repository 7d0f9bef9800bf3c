"""The identity file: made once, whole, for its owner alone; and what is proven with it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pyccl._io import identity as identities
from pyccl._io.identity import Identity, default_path, is_signed, key_of_certificate_untrusted, peer_id
from pyccl.errors import UsageError


def test_it_is_made_on_first_use_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "config" / "pyccl" / "identity.pem"
    old = os.umask(0)
    try:
        first = Identity.load(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert Identity.load(path).public == first.public
    assert list(path.parent.iterdir()) == [path]


def test_several_that_begin_at_once_end_with_the_same_one(tmp_path: Path) -> None:
    path, found, start = tmp_path / "identity.pem", [], threading.Barrier(8)

    def load() -> None:
        start.wait()
        found.append(Identity.load(path).public)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_use_is_refused_and_left_alone(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load(path)
    path.chmod(mode)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=f"mode {mode:04o}"):
        Identity.load(path)
    assert path.read_bytes() == before and path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "content", [b"", b"secret words", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_holds_no_key_is_refused_without_its_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="no Ed25519 private key") as caught:
        Identity.load(path)
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__context__ is None


def test_what_is_no_file_and_what_can_not_be_made_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}: not a file"):
        Identity.load(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"file/identity\.pem: "):
        Identity.load(tmp_path / "file" / "identity.pem")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYCCL_IDENTITY", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    assert default_path() == Path("/home/ann/.config/pyccl/identity.pem")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/conf")
    assert default_path() == Path("/conf/pyccl/identity.pem")
    monkeypatch.setenv("PYCCL_IDENTITY", "/keys/one.pem")
    assert default_path() == Path("/keys/one.pem")


def test_a_signature_is_of_one_key_and_one_text() -> None:
    ann, bob = Identity.new(), Identity.new()
    signature = ann.sign(b"text")
    assert is_signed(ann.public, signature, b"text")
    assert not is_signed(bob.public, signature, b"text")
    assert not is_signed(ann.public, signature, b"Text")
    assert not is_signed(ann.public, bytes(64), b"text")
    assert not is_signed(bytes(32), signature, b"text")


def test_its_certificate_carries_its_key_and_other_bytes_carry_none() -> None:
    ann = Identity.new()
    pem = ann.certificate().decode()
    der = identities.x509.load_pem_x509_certificate(pem.encode()).public_bytes(identities.serialization.Encoding.DER)
    assert key_of_certificate_untrusted(der) == ann.public
    for wrong in (b"", der[:-1], der[:100], b"\x30" * 300):
        assert key_of_certificate_untrusted(wrong) is None


def test_run_keys_differ_and_nothing_prints_a_secret() -> None:
    ann, bob = Identity.new(), Identity.new()
    assert ann.run_key() == ann.run_key() != bob.run_key() and len(ann.run_key()) == 32
    assert repr(ann) == f"Identity({ann.public.hex()[:16]})"


def test_peer_ids_of_one_identity_differ_by_their_salt_and_by_identity() -> None:
    ann, bob = Identity.new(), Identity.new()
    ids = {peer_id(who.public, salt) for who in (ann, bob) for salt in (bytes(16), b"\1" * 16)}
    assert len(ids) == 4 and all(len(id_) == 16 for id_ in ids)
