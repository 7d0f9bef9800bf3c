"""Invites on command lines, which everybody on a machine can read."""

from __future__ import annotations

import os
import sys

from pyccl._io.address import VARIABLE, is_invite


def hide_invite(argument: str | None) -> None:
    """Begin this program anew, at once, with the invite in its environment, which only its user can read.

    Where it was not on the command line of this process there is nothing to hide.
    """
    if not is_invite(argument) or argument not in sys.orig_argv:
        return
    assert argument is not None
    rest = [word for word in sys.orig_argv[1:] if word != argument]
    os.execve(sys.executable, [sys.orig_argv[0], *rest], os.environ | {VARIABLE: argument})
