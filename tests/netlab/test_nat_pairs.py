"""Peers behind routers get connected, and how: each pair of kinds with --long, else those that differ most. As root."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyccl.bench import nat, nat_page
from pyccl.bench.machine import Machine
from pyccl.cli.main import main
from pyccl.netlab.scenario import Nat

LACKING = [tool for tool in ("nft", "miniupnpd") if shutil.which(tool) is None]
as_root = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root"),
    pytest.mark.skipif(bool(LACKING), reason=f"no {' and no '.join(LACKING)}: apt-get install nftables miniupnpd"),
]
FEW = (
    (Nat.OPEN, Nat.PORT_RESTRICTED),
    (Nat.FULL_CONE, Nat.SYMMETRIC),
    (Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED),
    (Nat.PORT_RESTRICTED, Nat.SYMMETRIC),
    (Nat.SYMMETRIC, Nat.UPNP),
)


@pytest.mark.parametrize(
    ("a", "b"),
    [pytest.param(*pair, marks=as_root) for pair in (nat.PAIRS if os.environ.get("PYCCL_TEST_LONG") else FEW)],
)
def test_two_peers_are_connected_as_their_routers_allow_and_reduce(a: Nat, b: Nat) -> None:
    cells: list[nat.Cell] = []
    nat.measure(nat.Plan(pairs=((a, b),), size_bytes=1 << 18), cells.append)
    ((run,),) = [cell.runs for cell in cells]
    print(f"{a} x {b}: {run}")
    assert run.error == ""
    assert run.path in nat.expected(a, b)
    assert run.wrong == 0


def test_the_table_expects_each_pair_once_and_relays_only_what_symmetric_keeps_apart() -> None:
    assert len(nat.PAIRS) == len(Nat) * (len(Nat) + 1) // 2
    relayed = {frozenset(pair) for pair in nat.PAIRS if nat.expected(*pair) == (nat.RELAYED,)}
    others = (Nat.PORT_RESTRICTED, Nat.SYMMETRIC, Nat.DOUBLE, Nat.FIREWALL)
    assert relayed == {frozenset((Nat.SYMMETRIC, other)) for other in others}
    assert all(nat.expected(a, b) == nat.expected(b, a) for a, b in nat.PAIRS)


def cell(a: Nat, b: Nat, *runs: nat.Run) -> nat.Cell:
    return nat.Cell(a, b, runs)


def test_the_page_has_each_pair_once_and_marks_what_is_not_expected() -> None:
    plan = nat.Plan(pairs=nat.PAIRS, repeat=3)
    cells = [cell(a, b, nat.Run("relayed", nat.expected(a, b)[0], 0.5)) for a, b in nat.PAIRS]
    cells[0] = cell(*nat.PAIRS[0], *(nat.Run("relayed", "relayed", seconds) for seconds in (1.0, 3.0, 2.0)))
    page = nat_page.page(nat.Result(plan, tuple(cells)), Machine.read())
    assert "{{" not in page
    measured = page[: page.index("## Expected")]
    assert measured.count("**relayed** 2.00 s") == 1
    assert measured.count(" 0.50 s") == len(nat.PAIRS) - 1
    assert "| firewall | direct 0.50 s |" in measured
    assert "median of 3" in measured
    assert "The runs were secure" in measured and "`pyccl bench nat --repeat 3 --write docs/nat.md`" in measured
    assert all(f"| {kind} |" in page[page.index("## Kinds") :] for kind in Nat)


def test_the_page_of_plain_runs_says_so() -> None:
    page = nat_page.page(nat.Result(nat.Plan(pairs=(), delay="1ms", secure=False), ()), Machine.read())
    assert "The runs were plain" in page
    assert "`pyccl bench nat --delay 1ms --insecure --write docs/nat.md`" in page


def test_what_was_not_connected_is_no_success() -> None:
    pair = (Nat.UPNP, Nat.UPNP)
    assert cell(*pair, nat.Run("relayed", "mapped", 1.0)).is_as_expected
    assert not cell(*pair, nat.Run("mapped", "mapped", 1.0, wrong=1)).is_as_expected
    failed = cell(*pair, nat.Run(error="peer 1: no"), nat.Run("mapped", "mapped", 1.0))
    assert not failed.is_as_expected and failed.paths == ("none", "mapped") and failed.connect_s == 1.0
    assert cell(*pair, nat.Run(error="no")).connect_s is None


@pytest.mark.parametrize(
    ("options", "runs"),
    [pytest.param([], "secure", marks=as_root), pytest.param(["--insecure"], "plain", marks=as_root)],
)
def test_the_command_writes_the_page(options: list[str], runs: str, tmp_path: Path) -> None:
    path = tmp_path / "nat.md"
    command = ["bench", "nat", "--kinds", "open", "--mib", "0.1", "--write", str(path), *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "open x open" in done.output and "direct" in done.output
    page = path.read_text(encoding="utf-8")
    assert "| open | direct " in page and f"The runs were {runs}" in page


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kinds", "cone"], "'cone' is none of open, full_cone"),
        (["--delay", "soon"], "'soon' is no time"),
        (["--repeat", "0"], "0 is not in the range"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(main, ["bench", "nat", *arguments])
    assert done.exit_code == 2 and text in done.output
