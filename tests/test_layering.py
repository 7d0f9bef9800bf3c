"""The arrows between the rooms of this repository: who may import or include whom. See ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyccl"
NATIVE = ROOT / "native"
REPOSITORY_ONLY = {"tests", "stress", "tools"}

# What a room may import: `pyccl` prefixes, and top-level modules that it must not touch. The longest prefix decides.
MAY_IMPORT_OF_PYCCL: dict[str, set[str]] = {
    "pyccl._proto": {"pyccl._proto", "pyccl.errors"},
    "pyccl._native": {"pyccl._native", "pyccl.errors"},
    "pyccl._io": {"pyccl._io", "pyccl._proto", "pyccl._native", "pyccl.errors", "pyccl.state", "pyccl.statefile"},
    "pyccl.state": {"pyccl._native", "pyccl.errors", "pyccl.statefile"},  # a value, which statesync moves
    "pyccl.statefile": {"pyccl.errors"},  # its format on disk
    "pyccl.errors": set(),
    "pyccl.processes": {"pyccl.processes"},
    "pyccl.netlab": {"pyccl.netlab", "pyccl.processes", "pyccl.units"},
    "pyccl.units": set(),
}
PROTO_MUST_NOT_IMPORT = {"socket", "time", "random", "secrets", "threading", "asyncio", "select", "selectors", "ssl"}
MARKS_OF_A_PURE_ROOM = ("pyccl._proto", "pyccl.errors")  # standard library only

# Layers of native/src, lowest first. A file includes headers of lower layers, and of its own.
LAYERS: list[set[str]] = [
    {"op_fsm", "map"},
    {"kernel", "element", "float_mode", "simd"},
    {
        *("frame", "digest", "reduce", "quant", "guard", "outer", "status", "schedule", "throttle", "lanes", "pace"),
        "ratchet",
    },
    {"seal"},
    {"link", "relay"},
    {"engine"},
]
# Every layer uses the statuses and the assertion macro.
EVERYWHERE = {"pyccl.h", "../include/pyccl.h", "status.h"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, wherever in the file, as a full dotted name."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from pyccl import errors` names a module, not an attribute
                deeper = PACKAGE.parent.joinpath(*source.split("."), alias.name)
                is_module = deeper.is_dir() or deeper.with_suffix(".py").is_file()
                yield f"{source}.{alias.name}" if is_module else source


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str | None:
    rooms = [room for room in MAY_IMPORT_OF_PYCCL if within(name, room)]
    return max(rooms, key=len, default=None)


def forbidden_imports(name: str, imported: str, stdlib: frozenset[str]) -> str | None:
    """Why module ``name`` must not import ``imported``, if it must not."""
    top = imported.split(".", maxsplit=1)[0]
    if top in REPOSITORY_ONLY:
        return f"{name} imports {imported}, which is not installed"
    room = room_of(name)
    if room is None:
        return None
    if top == "pyccl" and not any(within(imported, prefix) for prefix in MAY_IMPORT_OF_PYCCL[room]):
        return f"{name} imports {imported}: {room} must not"
    if room == "pyccl._proto" and top in PROTO_MUST_NOT_IMPORT:
        return f"{name} imports {imported}: time, randomness and sockets come in as arguments"
    if room in MARKS_OF_A_PURE_ROOM and top != "pyccl" and top not in stdlib:
        return f"{name} imports {imported}: {room} uses the standard library only"
    return None


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_module_imports_along_the_arrows_only(path: Path) -> None:
    name = module_name(path)
    # build.py runs at build time and belongs to no room.
    if name == "pyccl._native.build":
        return
    faults = [forbidden_imports(name, imported, sys.stdlib_module_names) for imported in imports(path)]
    assert not [fault for fault in faults if fault]


def includes(path: Path) -> Iterator[str]:
    """What ``path`` includes in quotes; system headers, in angle brackets, need no check."""
    for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        yield match[1]


def layer_of(stem: str) -> int:
    """Layer of a file by its name; ``reduce_avx2.c`` and ``reduce_int.h`` belong to ``reduce``."""
    for number, modules in enumerate(LAYERS):
        if any(stem == module or stem.startswith(module + "_") for module in modules):
            return number
    raise AssertionError(f"native/src/{stem}.*: no layer in tests/test_layering.py")


def forbidden_includes(name: str, included: str) -> str | None:
    """Why ``native/src/name`` must not include ``included``, if it must not."""
    if included in EVERYWHERE:
        return None
    if "/" in included or not included.endswith(".h"):
        return f"{name} includes {included}: only headers of native/src and pyccl.h"
    if layer_of(Path(included).stem) > layer_of(Path(name).stem):
        return f"{name} includes {included}, which lies above it"
    return None


@pytest.mark.parametrize("path", sorted((NATIVE / "src").glob("*.[ch]")), ids=lambda path: path.name)
def test_native_file_includes_down_the_layers_only(path: Path) -> None:
    faults = [forbidden_includes(path.name, included) for included in includes(path)]
    assert not [fault for fault in faults if fault]


def test_public_header_includes_system_headers_only() -> None:
    assert list(includes(NATIVE / "include" / "pyccl.h")) == []


@pytest.mark.parametrize(
    ("name", "included"),
    [("op_fsm.c", "engine.h"), ("link.h", "engine.h"), ("frame.c", "link.h"), ("frame.c", "../tests/test.h")],
)
def test_arrow_back_between_native_layers_is_found(name: str, included: str) -> None:
    assert forbidden_includes(name, included)


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("pyccl._proto.master", "socket"),
        ("pyccl._proto.master", "trio"),
        ("pyccl._proto.member", "pyccl._io.codec"),
        ("pyccl._native.handles", "pyccl._proto.limits"),
        ("pyccl._io.session", "pyccl.communicator"),
        ("pyccl.errors", "pyccl._proto"),
        ("pyccl.cli.main", "tests.helpers"),
    ],
)
def test_arrow_back_between_python_rooms_is_found(name: str, imported: str) -> None:
    assert forbidden_imports(name, imported, frozenset({"socket"}))
