"""``pyccl bench all``: a quick run of the whole suite; every table and plot is there, every figure is the run's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bench_runs import Finished, bench
from click.testing import CliRunner

from pyccl.bench import suite, tables
from pyccl.bench.conductor import ExitStatus
from pyccl.bench.show import seconds
from pyccl.cli.main import main

PNG = b"\x89PNG\r\n\x1a\n"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
PLOTS_OF = {
    "sizes": {"sizes"}, "scale": {"scale"}, "kernels": {"codecs"}, "pacific": {"share"}, "lines": {"share"},
    "connections": {"connections"}, "rtt": {"rtt"},
}  # fmt: skip
ON_LOOPBACK = ("loopback", "sizes", "scale", "kernels", "digest", "outer", "encryption", "changes")
IN_A_LAB = ("pacific", "lines", "algorithms", "plans", "connections", "rtt")


def quick(out: Path, *names: str) -> Finished:
    finished = bench("all", "--quick", "--out", str(out), "--only", ",".join(names))
    assert finished.left == []
    return finished


def figures(told: dict[str, Any]) -> list[str]:
    """Of a run, as they must stand in its rows: its medians."""
    if "sizes" in told:
        return [seconds(size["seconds"]["median"]) for size in told["sizes"]]
    if "systems" in told:
        return [seconds(system["seconds"]["median"]) for system in told["systems"].values()]
    if "rates" in told:
        return [f"{rate['gib_per_s']['median']:.1f}" for rate in told["rates"]]
    if told["bench"] == "encryption":
        return [seconds(told[name]["seconds"]["median"]) for name in ("plain", "sealed")]
    return [seconds((told["total_s"] if told["bench"] == "join" else told["killed"]["gap_s"])["median"])]


def check(out: Path, names: tuple[str, ...]) -> None:
    page = (out / "performance.md").read_text(encoding="utf-8")
    report = json.loads((out / "performance.json").read_text(encoding="utf-8"))
    assert set(report) == set(names) and "{{" not in page
    for name in names:
        assert len(report[name]) == len(suite.PARTS[name].quick)
        for told, run in zip(report[name], suite.PARTS[name].quick, strict=True):
            assert told["command"] == f"pyccl bench {run.arguments}" and "failed" not in told
            assert told["told"]["machine"]["cpu"] in page
            at = page.index(f"| `{told['command']}` |")
            rows = page[at:].split("\n\n", 1)[0]
            for figure in figures(told["told"]):
                assert figure in rows, (told["command"], figure)
    drawn = set().union(*(PLOTS_OF.get(name, set()) for name in names))
    assert {path.name for path in out.glob("*.png")} == {f"performance-{name}.png" for name in drawn}
    for name in drawn:
        assert (out / f"performance-{name}.png").read_bytes().startswith(PNG)
        assert f"](performance-{name}.png)" in page
    missing = set().union(*PLOTS_OF.values()) - drawn
    assert all(f"No plot: of `{name}` nothing was measured." in page for name in missing)
    for name in suite.PARTS:
        assert (f"pyccl bench all --only {name}`" in page) == (name not in names)


def test_the_parts_on_loopback_fill_their_tables_and_plots(tmp_path: Path) -> None:
    finished = quick(tmp_path, *ON_LOOPBACK)
    assert finished.status == 0, finished.stderr
    check(tmp_path, ON_LOOPBACK)


@as_root
def test_the_parts_over_long_lines_fill_their_tables_and_plots(tmp_path: Path) -> None:
    finished = quick(tmp_path, *IN_A_LAB)
    assert finished.status == 0, finished.stderr
    check(tmp_path, IN_A_LAB)


def test_the_two_tests_above_run_every_part_and_the_page_has_a_place_for_each() -> None:
    assert {*ON_LOOPBACK, *IN_A_LAB} == set(suite.PARTS)
    for kind in ("full", "quick"):  # a row is found by its command
        commands = [run.arguments for part in suite.PARTS.values() for run in getattr(part, kind)]
        assert len(set(commands)) == len(commands)
    template = (Path(tables.__file__).parent / "performance.template.md").read_text(encoding="utf-8")
    for name in suite.PARTS:
        assert template.count(f"{{{{table {name}}}}}") == 1
    for name in set().union(*PLOTS_OF.values()):
        assert template.count(f"{{{{plot {name}}}}}") == 1


def test_what_was_not_asked_for_stays_as_an_earlier_run_left_it(tmp_path: Path) -> None:
    assert quick(tmp_path, "digest").status == 0
    before = json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))
    finished = quick(tmp_path, "loopback")
    assert finished.status == 0, finished.stderr
    check(tmp_path, ("loopback", "digest"))
    assert json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))["digest"] == before["digest"]


def test_what_cannot_run_here_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ip and nsenter there is no lab, whoever asks."""
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = quick(tmp_path / "out", "algorithms", "digest")
    assert finished.status == 0, finished.stderr
    page = (tmp_path / "out" / "performance.md").read_text(encoding="utf-8")
    (run,) = suite.PARTS["algorithms"].quick
    assert f"| `pyccl bench {run.arguments}` | not measured: ip and nsenter not found" in page
    assert "GiB/s" in page and "| `pyccl bench digest --mib 0.1` | " in page
    assert "not measured: ip and nsenter not found" in finished.stdout


def test_exit_status_tells_a_failure_but_not_what_this_machine_lacks() -> None:
    def failed(status: int) -> suite.Told:
        return {"command": "pyccl bench x", "failed": "why", "status": status}

    assert suite.status({"a": [{"command": "x", "told": {}}], "b": [failed(ExitStatus.NO_LAB)]}) is ExitStatus.OK
    both = [failed(ExitStatus.NO_TORCH), failed(ExitStatus.WRONG_VALUES)]
    assert suite.status({"a": both}) is ExitStatus.WRONG_VALUES
    assert suite.status({"a": [failed(-9)]}) is ExitStatus.CHILD_FAILED


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--only", "digest,moon"], "'moon' is none of loopback, "), (["--quick"], "its figures are not for docs")],
)
def test_bad_arguments_are_refused(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["bench", "all", *arguments])
    assert result.exit_code == 2 and text in result.output and list(tmp_path.iterdir()) == []


def test_a_torn_file_of_figures_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "performance.json").write_text("{", encoding="utf-8")
    result = CliRunner().invoke(main, ["bench", "all", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "performance.json can't be used" in result.output
