"""What the ranks of the all-reduce benchmark accept as a right result, and what they count on their sockets."""

from __future__ import annotations

import socket
from dataclasses import replace

import numpy as np
import pytest

import pyccl
from pyccl.bench import reduce_peer, wire
from pyccl.bench.reduce_peer import PERIOD, Settings, check, expected, pattern
from pyccl.codecs import CODECS

SETTINGS = Settings(
    master="", world=3, size_bytes=0, iterations=1, warmup=0, dtype="float32", op="sum", quantize=None,
    connections="auto", algorithm="auto", in_place=True, gloo=False, ahead_ns=0, address="127.0.0.1", interface="lo",
    secure=False, relay=False, optimize=False, max_upload=None, max_download=None, timeout_s=60.0,
)  # fmt: skip


@pytest.mark.parametrize("op", ["sum", "avg", "prod", "min", "max"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_right_result_is_accepted_and_a_wrong_element_is_not(dtype: str, op: str) -> None:
    settings = replace(SETTINGS, dtype=dtype, op=op)
    result = np.resize(expected(np.dtype(dtype), op, 3), PERIOD + 100).astype(dtype)
    assert check(result, settings, quantize=None) <= 1
    result[-1] += np.array(1, dtype)
    assert check(result, settings, quantize=None) > 1


def test_integers_wrap_and_must_be_exact() -> None:
    settings = replace(SETTINGS, dtype="int8", op="prod")
    result = np.resize(expected(np.dtype("int8"), "prod", 3), 1000)
    assert result.dtype == np.int8 and check(result, settings, quantize=None) == 0
    result[7] += 1
    assert check(result, settings, quantize=None) > 1


def test_a_nan_is_wrong() -> None:
    assert check(np.full(10, np.nan, np.float32), SETTINGS, quantize="uint8") > 1


@pytest.mark.parametrize("codec", ["uint8", "int8", "fp8_e4m3", "bfloat16"])
def test_an_input_that_was_not_reduced_is_wrong_even_where_16_or_8_bits_are_allowed(codec: str) -> None:
    assert check(np.resize(pattern(np.dtype("float32"), 0), 1000), SETTINGS, quantize=codec) > 1


def test_every_codec_has_an_error_that_its_all_reduce_keeps_to() -> None:
    assert reduce_peer.CODEC_ERROR.keys() == CODECS.keys()
    for codec in CODECS:
        for op in ("sum", "avg", "prod", "min", "max"):
            for world in (2, 3, 5):
                settings = replace(SETTINGS, op=op, world=world, quantize=codec)
                inputs = [pattern(np.dtype("float32"), rank) for rank in range(world)]
                result = pyccl.reference_all_reduce(inputs, op=op, quantize=codec)
                assert check(result, settings, codec) <= 1, (codec, op, world)


def test_ranks_have_different_inputs() -> None:
    dtype = np.dtype("float32")
    assert not np.array_equal(pattern(dtype, 0), pattern(dtype, 1))


def test_bfloat16_has_a_dtype() -> None:
    pytest.importorskip("ml_dtypes")
    assert reduce_peer.dtype_of("bfloat16").itemsize == 2


def test_bytes_on_new_tcp_sockets_are_counted_and_unix_sockets_are_told_apart() -> None:
    before = wire.sockets()
    left, right = socket.socketpair()
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    with server, client, accepted, left, right:
        opened = wire.sockets() - before
        assert (len(opened.tcp), len(opened.unix)) == (2, 2)  # a listener carries nothing
        start = wire.traffic(opened.tcp)
        client.sendall(b"x" * 1000)
        got = b""
        while len(got) < 1000:
            got += accepted.recv(1000)
        moved = wire.traffic(opened.tcp) - start
    assert moved.tx_bytes >= 1000 and moved.rx_bytes == 1000


def test_mapped_shared_memory_is_found() -> None:
    shared_memory = pytest.importorskip("multiprocessing.shared_memory")
    block = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert any(block.name.lstrip("/") in path for path in wire.shared_memory())
    finally:
        block.close()
        block.unlink()
