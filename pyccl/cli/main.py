"""The ``pyccl`` command: one click group, one file per command. Parses and prints; decides nothing."""

from __future__ import annotations

import click

from pyccl.cli.bench import bench
from pyccl.cli.bench_all import all_command
from pyccl.cli.demo import demo
from pyccl.cli.doctor import doctor
from pyccl.cli.netlab import netlab
from pyccl.cli.status import status
from pyccl.cli.stress import stress


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyccl-p2p", prog_name="pyccl")
def main() -> None:
    """Collectives for peers that come and go."""


bench.add_command(all_command)
main.add_command(bench)
main.add_command(demo)
main.add_command(doctor)
main.add_command(netlab)
main.add_command(status)
main.add_command(stress)


if __name__ == "__main__":
    main()
