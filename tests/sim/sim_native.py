"""`ffi` and `lib`: the compiled operation machine that the simulator drives.

It is that of the installed extension; or, for a canary in C, one that sim_canaries.py has built with a planted bug:
then OP_FSM names its shared library, which must be so before this module is imported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
OP_FSM: Final = "PYCCL_SIM_OP_FSM"


def _load() -> tuple[Any, Any]:
    path = os.environ.get(OP_FSM)
    if path is None:
        from pyccl._native._pyccl import ffi, lib  # noqa: PLC0415

        return ffi, lib
    import cffi  # noqa: PLC0415

    header = (ROOT / "native" / "include" / "pyccl.h").read_text(encoding="utf-8")
    declarations = header.partition("/* cffi: begin */")[2].partition("/* cffi: end */")[0]
    planted = cffi.FFI()
    planted.cdef(re.sub(r"/\*.*?\*/", " ", declarations, flags=re.DOTALL))
    return planted, planted.dlopen(path, planted.RTLD_LAZY)


ffi, lib = _load()
