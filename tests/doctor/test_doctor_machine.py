"""Findings about a machine: what is judged of which figures, and this machine's own."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from pyccl.doctor import machine
from pyccl.doctor.finding import EXIT, Finding, Level, worst


def test_buffers_are_judged_by_their_limit() -> None:
    assert machine.judge_window("receive", "4096\t131072\t33554432\n").level is Level.OK
    small = machine.judge_window("receive", "4096 131072 1048576")
    assert small.level is Level.WARNING and small.data == {"bytes_max": 1 << 20}
    assert "net.ipv4.tcp_rmem" in small.advice
    assert "net.ipv4.tcp_wmem" in machine.judge_window("write", "4096 16384 1048576").advice
    for text in ("", "1 2", "a b c"):
        assert machine.judge_window("write", text).level is Level.NOTE


def test_a_kernel_without_bbr_is_a_warning() -> None:
    assert machine.judge_congestion("cubic", True).level is Level.OK
    without = machine.judge_congestion("cubic", False)
    assert without.level is Level.WARNING and "tcp_bbr" in without.advice and "cubic" in without.text


def test_few_open_files_are_a_warning() -> None:
    assert machine.judge_files(1024, 4096).level is Level.OK
    assert machine.judge_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY).level is Level.OK
    few = machine.judge_files(256, 4096)
    assert few.level is Level.WARNING and "ulimit" in few.advice


def test_this_machines_kernels_give_the_same_bytes() -> None:
    finding = machine.kernels()
    assert finding.level is Level.OK, finding.text
    assert finding.data["differing"] == []
    assert finding.data["compared"] > 0 or finding.data["kernels"] == ["scalar"]


def test_a_kernel_that_gives_other_bytes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kernels_here", lambda: ("scalar", "wrong"))

    def run(name: str, compute: Callable[[], bytes]) -> bytes:
        computed = compute()
        return computed[:-1] + bytes([computed[-1] ^ (name == "wrong")])

    finding = machine.kernels(run)
    assert finding.level is Level.ERROR and "do not take part" in finding.advice
    assert "sum of float32 (wrong)" in finding.data["differing"]
    assert any(name.startswith("codec ") for name in finding.data["differing"])
    assert len(finding.data["differing"]) == finding.data["compared"]


def test_versions_processor_and_sockets_of_this_machine_are_told() -> None:
    versions = machine.versions_here().data
    assert versions.keys() >= {"pyccl", "python", "numpy", "trio", "openssl"} and None not in versions.values()
    assert machine.cpu().data["kernel"] in ("scalar", "avx2", "avx512", "neon")
    names = [finding.name for finding in machine.sockets()]
    assert names == ["socket receive buffers", "socket write buffers", "congestion control", "open files"]


def test_an_identity_is_looked_at_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    assert machine.identity(path).level is Level.NOTE
    assert not path.exists()
    machine.Identity.load(path)
    good = machine.identity(path)
    assert good.level is Level.OK and len(good.data["identity"]) == 16
    path.chmod(0o644)
    bad = machine.identity(path)
    assert bad.level is Level.ERROR and "0644" in bad.text and "chmod 600" in bad.advice
    path.chmod(0o600)
    path.write_bytes(b"nonsense")
    assert machine.identity(path).level is Level.ERROR


def test_the_worst_finding_decides_the_exit_status() -> None:
    found = [Finding("a", level, "") for level in Level]
    assert [EXIT[worst(found[: n + 1])] for n in range(4)] == [0, 0, 1, 3]
    assert worst([]) is Level.OK
    assert found[2].to_json() == {"name": "a", "level": "warning", "text": "", "advice": "", "data": {}}
