"""``pyccl bench all``: options, files and exit status; what runs is in ``pyccl.bench.suite``."""

from __future__ import annotations

import importlib.resources
import json
import sys
from pathlib import Path
from typing import Final

import click

from pyccl.bench import machine, suite, tables
from pyccl.bench.conductor import BenchError
from pyccl.cli.bench import EPILOG
from pyccl.processes.children import Children, Interrupted

PAGE: Final = "performance.md"
RAW: Final = "performance.json"


def _parts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return tuple(suite.PARTS)
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in suite.PARTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(suite.PARTS)}", ctx, param)
    return tuple(name for name in suite.PARTS if name in names)


@click.command("all", epilog=EPILOG)
@click.option("--only", "names", callback=_parts, metavar="NAME,NAME", help=f"Of {', '.join(suite.PARTS)}.")
@click.option("--quick", is_flag=True, help="Tiny sizes: whether everything runs, not how fast.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help=f"Where {PAGE}, its plots and {RAW} go; docs unless given.",
)  # fmt: skip
def all_command(names: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Run the whole suite and write its tables and plots.

    Three quarters of an hour; the long lines need root. What cannot run is named in its table. Parts that are not asked
    for stay as the JSON file in the directory has them.
    """
    if out is None:
        if quick:
            raise click.UsageError("--quick needs --out: its figures are not for docs")
        out = Path("docs")
    try:
        from pyccl.bench import plots  # noqa: PLC0415  matplotlib is optional
    except ImportError as error:
        raise click.UsageError(f"plots need matplotlib: pip install matplotlib ({error})") from error
    raw = out / RAW
    try:
        out.mkdir(parents=True, exist_ok=True)
        report: suite.Report = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--out: {raw} can't be used: {error}") from error
    try:
        with Children() as children:
            for name in names:
                report[name] = suite.run(
                    suite.PARTS[name], quick, machine.is_installed("torch"), children, click.echo
                )
                _keep(report, raw)  # what was measured stays if a later part is interrupted
    except BenchError as error:
        click.echo(f"pyccl bench all: {error}", err=True)
        sys.exit(int(error.status))
    except Interrupted as interrupted:
        click.echo(f"pyccl bench all: ended by signal {interrupted.signal_number}", err=True)
        sys.exit(128 + interrupted.signal_number)
    template = importlib.resources.files("pyccl.bench").joinpath("performance.template.md").read_text(encoding="utf-8")
    (out / PAGE).write_text(tables.page(template, report, plots.save(report, out)), encoding="utf-8")
    click.echo(f"{out / PAGE}, {raw}")
    sys.exit(int(suite.status({name: report[name] for name in names})))


def _keep(report: suite.Report, raw: Path) -> None:
    """A line for each part."""
    lines = [f"{json.dumps(name)}: {json.dumps(report[name])}" for name in suite.PARTS if name in report]
    raw.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
