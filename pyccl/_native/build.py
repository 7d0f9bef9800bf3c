"""Write the C source of the extension module ``pyccl._native._pyccl``: ``python build.py OUTPUT.c``.

Run by CMake at build time, never imported by the package. What Python may call is what stands between the two
``cffi`` marks of ``native/include/pyccl.h``: one list, in one place. The module uses the limited API, so one build
serves every CPython from 3.11 on.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cffi

HEADER = Path(__file__).resolve().parents[2] / "native" / "include" / "pyccl.h"


def declarations(header: str) -> str:
    """Return the text between the marks, without comments (cffi's parser does not know all of C's)."""
    marked = re.search(r"/\* cffi: begin \*/(.*)/\* cffi: end \*/", header, re.DOTALL)
    if marked is None:
        raise SystemExit(f"{HEADER}: no text between the marks 'cffi: begin' and 'cffi: end'")
    return re.sub(r"/\*.*?\*/", " ", marked.group(1), flags=re.DOTALL)


def main(output: Path) -> None:
    builder = cffi.FFI()
    builder.cdef(declarations(HEADER.read_text(encoding="utf-8")))
    builder.set_source("pyccl._native._pyccl", '#include "pyccl.h"', py_limited_api=True)
    builder.emit_c_code(str(output))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python build.py OUTPUT.c")
    main(Path(sys.argv[1]))
