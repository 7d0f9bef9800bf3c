"""This machine: versions, CPU, kernels, sockets, identity. Functions of what was read judge; the last ones read."""

from __future__ import annotations

import platform
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pyccl._io.identity import Identity, default_path, short
from pyccl._native._pyccl import ffi, lib
from pyccl.bench.kernels import BLOCK, DTYPES, OPS, codecs, kernel, kernels_here
from pyccl.bench.machine import CPUINFO, cpu_model, versions
from pyccl.doctor.finding import Finding, Level
from pyccl.errors import UsageError

TCP_RMEM: Final = Path("/proc/sys/net/ipv4/tcp_rmem")
TCP_WMEM: Final = Path("/proc/sys/net/ipv4/tcp_wmem")
# Of a line of 400 Mbit/s and 150 ms: less than what is on its way at once.
WINDOW_BYTES: Final = 4 << 20
FILES_MIN: Final = 1024  # open ones: 64 connections to each of many peers
_ELEMENTS: Final = 1031  # a prime: no vector's length divides it
_SEED: Final = 7
_FLOATS: Final = ("float16", "float32", "float64", "bfloat16")
_BITS: Final = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


# ---- judged


def judge_window(which: str, text: str) -> Finding:
    """Of /proc/sys/net/ipv4/tcp_rmem or tcp_wmem: least, default and most bytes of a socket's buffer."""
    name = f"socket {which} buffers"
    try:
        most = int(text.split()[2])
    except (IndexError, ValueError):
        return Finding(name, Level.NOTE, "the kernel does not tell their limit")
    data = {"bytes_max": most}
    if most >= WINDOW_BYTES:
        return Finding(name, Level.OK, f"up to {most / 2**20:.1f} MiB a connection", data=data)
    least = f"sysctl -w net.ipv4.tcp_{which[0]}mem='4096 131072 {4 * WINDOW_BYTES}'"
    text = f"up to {most / 2**20:.1f} MiB a connection: a long line needs many connections to be full"
    return Finding(name, Level.WARNING, text, f"as root: {least}", data)


def judge_congestion(default: str, has_bbr: bool) -> Finding:
    data = {"default": default, "bbr": has_bbr}
    if has_bbr:
        return Finding("congestion control", Level.OK, f"BBR for long lines, {default} by default", data=data)
    return Finding(
        "congestion control",
        Level.WARNING,
        f"no BBR, {default} only: on long lines with some loss a fraction of their rate",
        "as root: modprobe tcp_bbr; and net.ipv4.tcp_allowed_congestion_control must name it",
        data,
    )


def judge_files(soft: int, hard: int) -> Finding:
    data = {"soft": soft, "hard": hard}
    if soft >= FILES_MIN or soft == resource.RLIM_INFINITY:
        return Finding("open files", Level.OK, f"{soft} at a time", data=data)
    text = f"{soft} at a time: connections to many peers may not all be made"
    return Finding("open files", Level.WARNING, text, f"ulimit -n {FILES_MIN}, or LimitNOFILE= of the service", data)


def judge_kernels(differing: list[str], names: tuple[str, ...], compared: int) -> Finding:
    data = {"kernels": list(names), "compared": compared, "differing": differing}
    if differing:
        return Finding(
            "kernel self-test",
            Level.ERROR,
            f"other bytes than the scalar ones: {', '.join(differing[:8])}",
            "do not take part: the members' results would differ. Report it with this output and /proc/cpuinfo",
            data,
        )
    return Finding("kernel self-test", Level.OK, f"{compared} results of {', '.join(names)}: the same bytes", data=data)


# ---- read


def versions_here() -> Finding:
    found = {**versions("trio", "cryptography"), "openssl": ssl.OPENSSL_VERSION}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding("versions", Level.OK, text, data=found)


def cpu() -> Finding:
    name = cpu_model(CPUINFO.read_text(encoding="utf-8", errors="replace")) or platform.machine()
    used = ffi.string(lib.pyccl_kernel_name()).decode()
    data = {"cpu": name, "kernel": used}
    if used == "scalar":
        text = f"{name}: no instruction set that the kernels know"
        return Finding("CPU", Level.NOTE, text, "reductions and codecs are some times slower", data)
    return Finding("CPU", Level.OK, f"{name}: {used} kernels", data=data)


def kernels(run: Callable[[str, Callable[[], bytes]], bytes] | None = None) -> Finding:
    """Every reduction and codec by every instruction set of this CPU against the scalar one, byte by byte.

    Args:
        run: instead of calling with that instruction set.
    """
    run = run or _run_with
    names = kernels_here()
    differing, compared = [], 0
    for case in _cases():
        expected = run("scalar", case.compute)
        for name in names:
            if name != "scalar":
                compared += 1
                if run(name, case.compute) != expected:
                    differing.append(f"{case.name} ({name})")
    return judge_kernels(differing, names, compared)


def sockets() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        default = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
            has_bbr = True
        except OSError:
            has_bbr = False
    return [
        judge_window("receive", _text(TCP_RMEM)),
        judge_window("write", _text(TCP_WMEM)),
        judge_congestion(default, has_bbr),
        judge_files(soft, hard),
    ]


def identity(path: Path | None = None) -> Finding:
    """Looks, and makes none."""
    path = path or default_path()
    if not path.exists():
        return Finding("identity", Level.NOTE, f"none yet: the first encrypted connection makes {path}")
    try:
        public = Identity.load(path).public
    except UsageError as e:
        return Finding("identity", Level.ERROR, str(e), f"chmod 600 {path}, or remove it: a new one is made")
    text = f"{short(public)}, in {path}, for its owner only"
    return Finding("identity", Level.OK, text, data={"identity": short(public), "path": str(path)})


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    compute: Callable[[], bytes]


def _run_with(name: str, compute: Callable[[], bytes]) -> bytes:
    with kernel(name):
        return compute()


def _cases() -> Iterator[_Case]:
    rng = np.random.default_rng(_SEED)
    for dtype in DTYPES:
        code = getattr(lib, f"PYCCL_{dtype.upper()}")
        item_bytes = int(lib.pyccl_dtype_size(code))
        inputs = [_draw(rng, dtype, item_bytes) for _ in range(2)]
        for op in OPS:
            if op != "avg" or dtype in _FLOATS:
                yield _Case(f"{op} of {dtype}", _reduction(code, getattr(lib, f"PYCCL_{op.upper()}"), inputs))
    x = rng.standard_normal(_ELEMENTS).astype(np.float32).view(np.uint8)
    for name, codec in codecs().items():
        yield _Case(f"codec {name}", _coding(codec, x))


def _draw(rng: np.random.Generator, dtype: str, item_bytes: int) -> np.ndarray[Any, Any]:
    """Any bits: of floats NaN, infinities, subnormals and both zeros are among them."""
    raw = rng.integers(0, 256, _ELEMENTS * item_bytes, np.uint8)
    if dtype in _FLOATS:
        bits = raw.view(_BITS[dtype])
        sign = np.array(1, bits.dtype) << np.array(8 * item_bytes - 1, bits.dtype)
        bits[:4] = 0, sign, 1, sign + np.array(1, bits.dtype)
    return raw


def _reduction(code: int, op: int, inputs: list[np.ndarray[Any, Any]]) -> Callable[[], bytes]:
    def compute() -> bytes:
        out = np.zeros_like(inputs[0])
        pins = [ffi.from_buffer("uint8_t[]", array) for array in (*inputs, out)]
        pointers = ffi.new("const void *[]", [ffi.cast("const void *", pin) for pin in pins[:-1]])
        assert lib.pyccl_reduce(code, op, pointers, ffi.NULL, len(inputs), _ELEMENTS, pins[-1]) == lib.PYCCL_OK
        return out.tobytes()

    return compute


def _coding(codec: int, x: np.ndarray[Any, Any]) -> Callable[[], bytes]:
    """Codes, and what they stand for."""

    def compute() -> bytes:
        codes = np.zeros(int(lib.pyccl_codec_size(codec, BLOCK, _ELEMENTS)), np.uint8)
        back = np.zeros_like(x)
        pins = [ffi.from_buffer("uint8_t[]", array) for array in (x, codes, back)]
        encoded = lib.pyccl_codec_encode(codec, lib.PYCCL_FLOAT32, BLOCK, pins[0], _ELEMENTS, pins[1])
        decoded = lib.pyccl_codec_decode(codec, lib.PYCCL_FLOAT32, BLOCK, pins[1], _ELEMENTS, pins[2])
        assert (encoded, decoded) == (lib.PYCCL_OK, lib.PYCCL_OK)
        return codes.tobytes() + back.tobytes()

    return compute


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
