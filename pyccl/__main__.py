"""``python -m pyccl``: the ``pyccl`` command."""

from pyccl.cli.main import main

main(prog_name="pyccl")
