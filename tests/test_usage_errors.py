"""Calls that are wrong in themselves: UsageError before anything is sent, arrays untouched. One process, one peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from masters import started_master

import pyccl
from pyccl._proto.epoch import Address
from pyccl.calls import rate

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    with started_master("--log-level", "error") as address:
        yield address


@pytest.fixture(scope="module")
def comm(master: str) -> Iterator[pyccl.Communicator]:
    with pyccl.connect(master, timeout=TIMEOUT_S) as comm:
        yield comm


def array(dtype: Any = np.float32, count: int = 12) -> np.ndarray[Any, Any]:
    return np.arange(count).astype(dtype)


def frozen() -> np.ndarray[Any, Any]:
    x = array()
    x.flags.writeable = False
    return x


WHOLE = array(count=24)


class Capsule:
    """Memory that is to be had as DLPack and in no other way."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self._x = x

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._x.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

BAD_ARRAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: [1.0, 2.0], "not list"),
    "a number": (lambda: 3.0, "not float"),
    "read-only": (frozen, "read-only"),
    "strided": (lambda: array()[::2], "not C-contiguous"),
    "Fortran order": (lambda: np.asfortranarray(array().reshape(3, 4)), "not C-contiguous"),
    "bool": (lambda: array(bool), "dtype bool"),
    "complex": (lambda: array(np.complex64), "dtype complex64"),
    "object": (lambda: array(object), "dtype object"),
    "other byte order": (lambda: array(">f4"), "dtype >f4"),
    "other byte order in a buffer": (lambda: memoryview(array(">f4")), "dtype >f4"),
    "text": (lambda: array().astype("U3"), "dtype str"),
    "fixed bytes": (lambda: array().astype("S4"), "dtype bytes"),
    "dates": (lambda: array(np.int64).view("datetime64[s]"), "dtype datetime64"),
    "durations": (lambda: array(np.int64).view("timedelta64[s]"), "dtype timedelta64"),
    "raw memory": (lambda: array().view("V4"), "dtype void"),
    "a read-only buffer": (lambda: memoryview(array()).toreadonly(), "read-only"),
    "a strided buffer": (lambda: memoryview(array())[::2], "not C-contiguous"),
    "zero-size, strided": (lambda: np.zeros((4, 0, 4), np.float64)[:, :, ::2].astype(complex), "dtype complex"),
    "structured": (lambda: np.zeros(3, [("a", "f4")]), "dtype"),
    "bytes": (lambda: b"0123", "read-only"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_all_reduce_refuses_an_array_it_can_not_reduce_in_place(comm: pyccl.Communicator, what: str) -> None:
    make, match = BAD_ARRAYS[what]
    with pytest.raises(pyccl.UsageError, match=match):
        comm.all_reduce(make())


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_all_reduce_refuses_an_out_it_can_not_write(comm: pyccl.Communicator, what: str) -> None:
    with pytest.raises(pyccl.UsageError):
        comm.all_reduce(array(), out=BAD_ARRAYS[what][0]())


def test_broadcast_refuses_what_all_reduce_refuses(comm: pyccl.Communicator) -> None:
    for make, match in BAD_ARRAYS.values():
        with pytest.raises(pyccl.UsageError, match=match):
            comm.broadcast(make(), root="0" * 32)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"op": "mean"}, "op='mean'"),
        ({"op": None}, "op=None"),
        ({"op": ["sum"]}, "op="),
        ({"tag": -1}, "tag=-1"),
        ({"tag": 2**32}, "tag=4294967296"),
        ({"tag": 1.0}, "tag=1.0"),
        ({"tag": True}, "tag=True"),
        ({"tag": "1"}, "tag='1'"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.0}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": None}, "timeout=None"),
        ({"timeout": "1"}, "timeout='1'"),
        ({"quantize": "uint3"}, "quantize='uint3' is not one of uint8, int8, fp8_e4m3, fp4_e3m0, bfloat16"),
        ({"quantize": ["uint8"]}, "quantize="),
        ({"quantize": "bfloat16", "quantize_block": 131072}, "quantize_block=131072"),
        ({"algorithm": "tree"}, "algorithm='tree'"),
        ({"algorithm": 2}, "algorithm=2"),
        ({"weight": 2.0}, "weight=2.0"),
        ({"op": "avg", "weight": -1.0}, "weight=-1.0"),
        ({"op": "avg", "weight": float("nan")}, "weight=nan"),
        ({"quantize": "uint8", "quantize_block": 100}, "quantize_block=100"),
        ({"quantize": "uint8", "quantize_block": 32}, "quantize_block=32"),
    ],
)
def test_all_reduce_refuses_bad_keywords(comm: pyccl.Communicator, keywords: dict[str, Any], match: str) -> None:
    x = array()
    with pytest.raises(pyccl.UsageError, match=match):
        comm.all_reduce(x, **keywords)
    assert np.array_equal(x, array())


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"op": "mean"}, "op='mean'"),
        ({"tag": -1}, "tag=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"quantize": "uint3"}, "quantize='uint3'"),
        ({"quantize": "uint8", "quantize_block": 100}, "quantize_block=100"),
        ({"weight": 2.0}, "weight=2.0"),
        ({"op": "avg", "weight": -1.0}, "weight=-1.0"),
        ({"algorithm": "tree"}, "algorithm='tree'"),
    ],
)
def test_reduce_scatter_refuses_bad_keywords(comm: pyccl.Communicator, keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        comm.reduce_scatter(array(), **keywords)


def test_reduce_scatter_refuses_what_has_no_axis_and_avg_of_integers(comm: pyccl.Communicator) -> None:
    with pytest.raises(pyccl.UsageError, match="no axis"):
        comm.reduce_scatter(np.zeros(()))
    with pytest.raises(pyccl.UsageError, match="no axis"):
        pyccl.reference_reduce_scatter([np.zeros(())])
    with pytest.raises(pyccl.UsageError, match="avg"):
        comm.reduce_scatter(array(np.int32), op="avg")


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_avg_of_integers_is_refused(comm: pyccl.Communicator, dtype: Any) -> None:
    with pytest.raises(pyccl.UsageError, match="avg"):
        comm.all_reduce(array(dtype), op="avg")


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (WHOLE[:12], WHOLE[1:13]),
        (WHOLE[1:13], WHOLE[:12]),
        (WHOLE[:12], WHOLE[11:23]),
        (Capsule(WHOLE[:12]), WHOLE[1:13]),
        (memoryview(WHOLE[:12]), WHOLE[4:16]),
        (WHOLE[:12], np.frombuffer(memoryview(WHOLE).cast("B")[4:52], np.float32)),
        (WHOLE[:12].reshape(3, 4), WHOLE[8:20].reshape(3, 4)),
        (array(), array(np.float64)),
        (array(), array(count=11)),
        (array(), array().reshape(3, 4)),
    ],
    ids=[
        *("ahead", "behind", "by one element", "through DLPack", "through a buffer", "through bytes", "of rows"),
        *("dtype", "count", "shape"),
    ],
)
def test_an_out_that_overlaps_in_part_or_does_not_fit_is_refused(
    comm: pyccl.Communicator, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(pyccl.UsageError, match="out"):
        comm.all_reduce(x, out=out)
    with pytest.raises(pyccl.UsageError, match="out"):
        comm.exchange(x, out=out, partner="00" * 16)


def test_what_is_right_passes_the_checks_and_finds_itself_alone(comm: pyccl.Communicator) -> None:
    x = array()
    for call in (
        lambda: comm.all_reduce(x),
        lambda: comm.all_reduce(x, out=x),
        lambda: comm.all_reduce(x, op=pyccl.ReduceOp.AVG, out=array()),
        lambda: comm.all_reduce(frozen(), out=array()),
        lambda: comm.all_reduce(WHOLE[:12], out=WHOLE[12:], tag=np.uint32(7), timeout=float("inf")),
        lambda: comm.all_reduce(array().reshape(3, 4), algorithm="direct", quantize=None, weight=1.0),
        lambda: comm.all_reduce(np.zeros(())),
        lambda: comm.all_reduce(memoryview(array())),
        lambda: comm.all_reduce(array(count=0)),
        lambda: comm.all_reduce(np.zeros((0, 4)), out=np.zeros((0, 4))),
        lambda: comm.all_reduce(np.zeros((3, 0), np.int8), op="max"),
        lambda: comm.all_reduce(array(), algorithm="ring"),
        lambda: comm.reduce_scatter(frozen()),
        lambda: comm.reduce_scatter(np.zeros((3, 0)), "max", quantize="uint8"),
        lambda: comm.broadcast(frozen(), root=comm.peer_id),
        lambda: comm.barrier(tag=2**32 - 1),
    ):
        with pytest.raises(pyccl.AloneError):
            call()
    assert np.array_equal(x, array())


@pytest.mark.parametrize("root", ["", "0" * 31, "g" * 32, b"0" * 32, 7, None])
def test_a_root_that_is_no_peer_id_is_refused(comm: pyccl.Communicator, root: Any) -> None:
    with pytest.raises(pyccl.UsageError, match="no peer id"):
        comm.broadcast(array(), root=root)
    with pytest.raises(pyccl.UsageError, match="no peer id"):
        comm.exchange(array(), out=array(), partner=root)


def test_exchange_with_oneself_and_into_what_can_not_be_written_is_refused(comm: pyccl.Communicator) -> None:
    stranger = "00" * 16
    with pytest.raises(pyccl.UsageError, match="itself"):
        comm.exchange(array(), out=array(), partner=comm.peer_id)
    with pytest.raises(pyccl.UsageError, match="read-only"):
        comm.exchange(frozen(), partner=stranger)
    with pytest.raises(pyccl.UsageError, match="read-only"):
        comm.exchange(array(), out=frozen(), partner=stranger)
    with pytest.raises(pyccl.UsageError, match="tag=-1"):
        comm.exchange(array(), partner=stranger, tag=-1)
    with pytest.raises(pyccl.PeerLostError, match="no member of epoch 1") as lost:
        comm.exchange(frozen(), out=array(), partner=stranger)
    assert lost.value.peer == stranger


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), None, "1"])
def test_other_calls_refuse_bad_timeouts_too(comm: pyccl.Communicator, timeout: Any) -> None:
    state = pyccl.SharedState({"x": array()})
    for call in (
        lambda: comm.barrier(timeout=timeout),
        lambda: comm.exchange(array(), partner="00" * 16, timeout=timeout),
        lambda: comm.broadcast(array(), root=comm.peer_id, timeout=timeout),
        lambda: comm.update_topology(timeout=timeout),
        lambda: comm.sync_shared_state(state, timeout=timeout),
        lambda: pyccl.Communicator("127.0.0.1:1").connect(timeout=timeout),
        lambda: pyccl.Communicator("127.0.0.1:1").connect(reach_timeout=timeout),
    ):
        with pytest.raises(pyccl.UsageError, match="timeout"):
            call()


@pytest.mark.parametrize(
    "address",
    ["", ":1", "h:", "h:0", "h:65536", "h:-1", "h:x", "h: 1", "[::1", "[::1]:", "a b:1", "http://h:1", None, 1, b"h:1"],
)
def test_an_address_that_is_none_is_refused(address: Any) -> None:
    with pytest.raises(pyccl.UsageError):
        pyccl.Communicator(address)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"group": -1}, "group=-1"),
        ({"group": 2**32}, "group="),
        ({"group": "0"}, "group='0'"),
        ({"connections": 0}, "connections=0"),
        ({"connections": 65}, "connections=65"),
        ({"connections": "many"}, "connections='many'"),
        ({"connections": 2.0}, "connections=2.0"),
        ({"max_upload": "fast"}, "max_upload='fast'"),
        ({"max_upload": "50"}, "max_upload='50'"),
        ({"max_upload": 50_000_000}, "max_upload=50000000"),
        ({"max_upload": "50mbps"}, "max_upload="),
        ({"max_upload": "-5mbit"}, "max_upload="),
        ({"max_download": "0mbit"}, "max_download='0mbit'"),
        ({"max_download": "999kbit"}, "max_download="),
        ({"max_download": "2000gbit"}, "max_download="),
        ({"max_download": "nanmbit"}, "max_download="),
        ({"max_download": ""}, "max_download=''"),
        ({"relay": "sometimes"}, "relay='sometimes'"),
        ({"relay": None}, "relay=None"),
        ({"listen": "example.org:1"}, "listen='example.org:1'"),
        ({"listen": "127.0.0.1:65536"}, "listen="),
        ({"listen": "127.0.0.1:"}, "listen="),
        ({"listen": ":0"}, "listen=':0'"),
        ({"listen": 48149}, "listen=48149"),
        ({"advertise": ":5"}, "advertise=':5'"),
        ({"advertise": "h:x"}, "advertise='h:x'"),
        ({"advertise": ["h:1", 2]}, "advertise=2"),
        ({"advertise": ["h:1"] * 6}, "at most 5"),
        ({"advertise": "pyccl://h:1/x"}, "advertise="),
    ],
)
def test_a_communicator_refuses_bad_keywords(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        pyccl.Communicator("127.0.0.1:1", **keywords)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("50mbit", 6_250_000), ("1 Gbit", 125_000_000), ("1500kbit", 187_500), ("2.5MBIT", 312_500)],
)
def test_a_rate_is_read_as_bits_per_second(text: str, bytes_per_s: int) -> None:
    assert rate("max_upload", text) == bytes_per_s


def test_nothing_works_before_connect_and_after_close(master: str) -> None:
    comm = pyccl.Communicator(master, group=9)
    calls: list[Callable[[], Any]] = [
        lambda: comm.all_reduce(array()),
        lambda: comm.all_reduce_async(array()),
        lambda: comm.broadcast(array(), root=comm.peer_id),
        lambda: comm.exchange(array(), partner="00" * 16),
        comm.barrier,
        comm.update_topology,
        comm.are_peers_pending,
        lambda: comm.sync_shared_state(pyccl.SharedState({"x": array()})),
    ]
    for call in calls:
        with pytest.raises(pyccl.UsageError, match="not connected"):
            call()
    assert (comm.epoch, comm.members, comm.world_size, comm.group_world_size) == (0, (), 0, 0)
    comm.close()
    comm.connect(timeout=TIMEOUT_S)
    assert comm.members == (comm.peer_id,) and comm.epoch == 1
    with pytest.raises(pyccl.UsageError, match="connected already"):
        comm.connect()
    comm.close()
    comm.close()
    for call in calls:
        with pytest.raises(pyccl.UsageError, match="closed"):
            call()


def test_a_usage_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        pyccl.Communicator("host:x")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({}, "at least one"),
        ({"": array()}, "name"),
        ({"x" * 1025: array()}, "name"),
        ({7: array()}, "name"),
        ({"\udc80": array()}, "name"),
        ({"x": [1, 2]}, "NumPy array"),
        ({"x": array(object)}, "Python objects"),
        ({"x": array()[::2]}, "C-contiguous"),
        ({"x": frozen()}, "read-only"),
        ({"x": WHOLE[:12], "y": WHOLE[11:]}, "share memory"),
        ({"x": WHOLE, "y": WHOLE}, "share memory"),
    ],
)
def test_a_shared_state_refuses_what_it_can_not_hold(arrays: dict[Any, Any], match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        pyccl.SharedState(arrays)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allow_content_inequality": ["y"]}, "no array 'y'"),
        ({"allow_content_inequality": ["x", 7]}, "no array 7"),
        ({"allow_content_inequality": "x"}, "collection of names"),
        ({"allow_content_inequality": 3}, "collection of names"),
        ({"allow_content_inequality": [["x"]]}, "collection of names"),
        ({"digest": "md5"}, "fast, sha256"),
        ({"digest": None}, "fast, sha256"),
        ({"digest": ["fast"]}, "fast, sha256"),
    ],
)
def test_a_shared_state_refuses_options_it_does_not_know(options: dict[str, Any], match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        pyccl.SharedState({"x": array()}, **options)


@pytest.mark.parametrize("revision", [-1, 2**63, 1.0, "1", None, True])
def test_a_revision_is_a_whole_number(revision: Any) -> None:
    with pytest.raises(pyccl.UsageError, match="revision"):
        pyccl.SharedState({"x": array()}, revision=revision)
    state = pyccl.SharedState({"x": array()}, revision=3)
    with pytest.raises(pyccl.UsageError, match="revision"):
        state.revision = revision
    assert state.revision == 3


def test_sync_refuses_what_it_does_not_know(comm: pyccl.Communicator) -> None:
    state = pyccl.SharedState({"x": array()})
    for strategy in ("receive", "SEND_ONLY", "", None, 1, ["send_only"]):
        with pytest.raises(pyccl.UsageError, match="strategy"):
            comm.sync_shared_state(state, strategy)  # type: ignore[arg-type]
    with pytest.raises(pyccl.UsageError, match="SharedState"):
        comm.sync_shared_state({"x": array()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "listen", "advertise"),
    [
        ({}, None, ()),
        ({"listen": ":7"}, Address("", 7), ()),
        ({"listen": "0.0.0.0"}, Address("0.0.0.0", 0), ()),
        ({"listen": "[::1]:7"}, Address("::1", 7), ()),
        ({"listen": "::"}, Address("::", 0), ()),
        ({"advertise": "peer.example"}, None, (Address("peer.example", 0),)),
        ({"advertise": ["h:7", "[2001:db8::1]:8"]}, None, (Address("h", 7), Address("2001:db8::1", 8))),
    ],
)
def test_where_a_peer_listens_and_what_it_says_of_it(
    keywords: dict[str, Any], listen: Address | None, advertise: tuple[Address, ...]
) -> None:
    reach = pyccl.Communicator("127.0.0.1:1", **keywords)._config.reach
    assert (reach.listen, reach.advertise, reach.relay) == (listen, advertise, "auto")
