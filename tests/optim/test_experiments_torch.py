"""tools/experiments: a few steps of two variants, what is kept of them, and replicas that are killed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "experiments"
TIMEOUT_S = 240
SMALL = ["--seeds", "1", "--batch", "8", "--curve-windows", "256", "--windows", "512"]
LETTERS = 97


def run(tool: str | Path, *arguments: str) -> str:
    """What it prints. Its folder is on its path, as for anybody; the source tree is not."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    told = subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def runs_in(path: Path) -> dict[str, Any]:
    runs: dict[str, Any] = json.loads(path.read_text())["runs"]
    return runs


def test_losses_are_measured_kept_and_reported(tmp_path: Path) -> None:
    out, names = tmp_path / "losses.json", ("every step", "streaming, overlap, fp4")
    arguments = ["--out", str(out), *SMALL, "--steps", "20", "--curve-every", "10", *names]
    run("losses.py", *arguments)
    kept = out.read_bytes()
    runs = runs_in(out)
    assert sorted(runs) == [f"{name}/0" for name in names]
    for told in runs.values():
        (first, early), (last, late) = told["curve"]
        assert (first, last) == (10, 20) and late < early and 0 < told["loss"] < math.log(LETTERS)
    every, streaming = (runs[f"{name}/0"] for name in names)
    assert every["rounds"] == 20 and streaming["rounds"] == 2  # slots of 10 steps
    assert streaming["tx_bytes"] < every["tx_bytes"] / 20
    assert 2 * streaming["tx_bytes_peak"] >= streaming["tx_bytes"] > streaming["tx_bytes_peak"]
    assert run("losses.py", *arguments) == "" and out.read_bytes() == kept  # nothing is run twice

    table = run("report.py", "--losses", str(out), "--blocked", str(tmp_path / "none"), "--plots", str(tmp_path))
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("| ")}
    assert f"{streaming['loss']:.4f}" in rows[names[1]]
    assert f"{streaming['loss'] / every['loss'] - 1:+.1%}" in rows[names[1]]
    assert all((tmp_path / f"optimizers-{name}.png").read_bytes()[1:4] == b"PNG" for name in ("loss", "time"))


def test_of_several_runs_on_a_line_the_one_with_the_median_wait_is_shown(tmp_path: Path) -> None:
    losses, blocked = tmp_path / "losses.json", tmp_path / "blocked.json"
    run("losses.py", "--out", str(losses), *SMALL, "--steps", "2", "--curve-every", "2", "every step")
    same = {"steps": 100, "step_s": 0.1, "hidden": 0.0, "tx_bytes": 24e6, "line_s": 0.5}
    told = [same | {"seconds": 12.0 + waited, "blocked": waited} for waited in (3.0, 1.0, 2.0)]
    blocked.write_text(json.dumps({"runs": {"DiLoCo": told, "LocalSGD": told[:1]}}))
    rows = run("report.py", "--losses", str(losses), "--blocked", str(blocked), "--plots", str(tmp_path)).splitlines()
    assert "| LocalSGD | 100 | 24.0 | 0.50 | 3.00 (20.0%) | 0.0 | 33.3% | 1 |" in rows
    assert "| DiLoCo | 100 | 24.0 | 0.50 | 2.00 (14.3%); 1.00 to 3.00 | 0.0 | 28.6% | 3 |" in rows


def test_replicas_that_are_killed_come_back_and_the_run_ends(tmp_path: Path) -> None:
    out = tmp_path / "losses.json"
    run(
        "losses.py", "--out", str(out), *SMALL, "--steps", "800", "--curve-every", "400", "--kills-step-s", "0.002",
        "DiLoCo, kills",
    )  # fmt: skip
    (told,) = runs_in(out).values()
    assert told["kills"] and told["loss"] < 3.0
    took_part = sum(told["present"])  # as many tokens as in 16 rounds of four, but for a last round untold
    assert took_part + len(told["kills"]) >= 64
    assert took_part <= 67
    assert max(told["present"]) == 4
    assert len(told["losses"]) == 1  # theta is the same for all


def test_a_replica_that_comes_back_when_the_others_have_left_does_not_train_alone(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(f"""
import multiprocessing, sys
sys.path.insert(0, {str(TOOLS)!r})
from losses import master
from replica import Replicas, Settings
from variants import BY_NAME

ours, theirs = multiprocessing.Pipe(duplex=False)
with master() as address:
    Replicas(theirs, address, BY_NAME["DiLoCo, kills"], Settings(steps=50, batch=8), seed=0, streams=[0], life=1).run()
theirs.close()
print(ours.recv())
""")
    assert run(script) == "('done', [])\n"
