"""What a communicator leaves behind: nothing."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cluster import DEADLINE_S, Cluster, Peer

import pyccl
from pyccl._io import envelope
from pyccl._proto.messages import Rejected, Welcome


def left_nothing(peer: Peer) -> None:
    seen = peer.ask("resources")
    assert seen["now"] == seen["before"]


def test_close_leaves_no_thread_socket_or_process(cluster: Cluster) -> None:
    peers = cluster.members(3)
    cluster.reduce(peers)
    for peer in peers:
        peer.ask("close")
        left_nothing(peer)


def test_close_leaves_nothing_whatever_was_open(cluster: Cluster) -> None:
    peer, other = cluster.members(2)
    peer.ask("submit", name="x", seed=1, count=100_000)
    call = peer.call("update_topology", thread="top")
    peer.ask("wait_safe_point")
    peer.ask("close")
    call.error("UsageError")
    peer.call("wait", name="x").error("UsageError")
    left_nothing(peer)
    other.call("barrier", tag=1).error("AloneError")


def test_an_eviction_leaves_nothing(cluster: Cluster) -> None:
    *rest, evicted = cluster.members(3)
    evicted.stop()
    cluster.reduce(rest)
    evicted.resume()
    evicted.call("barrier").error("EvictedError")
    evicted.ask("close")
    left_nothing(evicted)


def test_connect_and_close_many_times_leaves_nothing(cluster: Cluster) -> None:
    member, visitor = cluster.members(2)
    for _ in range(5):
        visitor.ask("close")
        left_nothing(visitor)
        member.ask("wait_world", world=1)
        cluster.admit([member], [visitor])
        cluster.reduce([member, visitor])


def test_close_with_the_master_stopped_ends(cluster: Cluster) -> None:
    peer, other = cluster.members(2)
    cluster.master.stop()
    for leaver in (peer, other):
        leaver.ask("close")
        left_nothing(leaver)


def test_a_communicator_that_is_dropped_leaves_the_run_and_nothing_else(cluster: Cluster) -> None:
    dropped, *rest = cluster.members(3)
    dropped.ask("drop_communicator")
    for peer in rest:
        peer.ask("wait_world", world=2)
    dropped.ask("wait_gone")
    left_nothing(dropped)
    cluster.reduce(rest)


@pytest.mark.parametrize("busy", ["idle", "in an operation", "at the safe point"])
def test_interpreter_exit_without_close_leaves_the_run(cluster: Cluster, busy: str) -> None:
    leaver, *rest = cluster.members(3)
    if busy == "in an operation":
        leaver.call("all_reduce", thread="reduce", seed=1, count=1000)
        leaver.ask("wait_blocked")
    elif busy == "at the safe point":
        leaver.call("update_topology", thread="top")
        leaver.ask("wait_safe_point")
    leaver.call("exit")
    assert leaver.wait() == 0
    assert cluster.reduce(rest)["world_size"] == 2


def test_interpreter_exit_while_the_master_is_stopped(cluster: Cluster) -> None:
    leaver, _ = cluster.members(2)
    cluster.master.stop()
    leaver.call("exit")
    assert leaver.wait() == 0


@pytest.mark.parametrize("exit_normally", [False, True], ids=["_exit", "exit"])
def test_a_forked_child_can_not_use_the_communicator_nor_harm_it(cluster: Cluster, exit_normally: bool) -> None:
    peers = cluster.members(2)
    told = peers[0].ask("fork", exit_normally=exit_normally)
    assert (told["class"], told["status"]) == ("UsageError", 0)
    cluster.reduce(peers)
    for peer in peers:
        peer.ask("close")
        left_nothing(peer)


def test_a_signal_to_end_the_program_is_not_held_up(cluster: Cluster) -> None:
    peer, other = cluster.members(2)
    peer.call("all_reduce", seed=1, count=1000)
    peer.ask("wait_blocked", thread="watch")
    peer.signal(signal.SIGTERM)
    assert peer.wait() == -signal.SIGTERM
    other.call("barrier", tag=1).error("AloneError")


# ---- what may listen where the master was thought to be


@contextmanager
def service(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that is no master."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stopped = threading.Event()
        conns: list[socket.socket] = []

        def serve() -> None:
            while True:
                conn, _ = server.accept()
                conns.append(conn)
                if stopped.is_set():
                    return
                behave(conn)

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            stopped.set()
            socket.create_connection((host, port)).close()
            thread.join(DEADLINE_S)
            for conn in conns:
                conn.close()


def refused_by(
    address: str, error: type[Exception] | tuple[type[Exception], ...], match: str, reach_timeout: float = 0.5
) -> None:
    threads = threading.active_count()
    comm = pyccl.Communicator(address)
    with pytest.raises(error, match=match):
        comm.connect(timeout=DEADLINE_S, reach_timeout=reach_timeout)
    for thread in threading.enumerate():
        if thread.name == "pyccl-resolver":  # it can't be interrupted; it ends with its question
            thread.join(DEADLINE_S)
    assert threading.active_count() == threads
    with pytest.raises(pyccl.UsageError, match="not connected"):
        comm.barrier()


def test_a_dead_port_is_master_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refused_by(f"127.0.0.1:{port}", pyccl.MasterUnavailableError, str(port))


def test_an_unknown_host_is_master_unavailable() -> None:
    refused_by("no-such-host.invalid:1", pyccl.MasterUnavailableError, "no-such-host")


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.7\r\n", b"220 mail ESMTP\r\n"),
        *(b"\0\0\0\1\xc0", b"\0\0\0\5hello", b"\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\2\x91\x03"),
    ],
)
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    def answer(conn: socket.socket) -> None:
        with suppress(OSError):  # it may have hung up at the first bytes
            conn.sendall(garbage)
            conn.shutdown(socket.SHUT_WR)

    with service(answer) as address:
        refused_by(address, pyccl.RemoteProtocolError, "does not speak pyccl", reach_timeout=DEADLINE_S)


NO_MASTER = (pyccl.RemoteProtocolError, pyccl.MasterUnavailableError)  # it says nonsense, or nothing that ends


def test_a_web_server_is_no_master() -> None:
    """It answers when it has read a line: whether there is one in a Hello is up to chance."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            refused_by(f"127.0.0.1:{server.server_port}", NO_MASTER, str(server.server_port))
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


def test_a_tls_server_is_no_master() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    met: list[str] = []

    def handshake(conn: socket.socket) -> None:
        try:
            context.wrap_socket(conn, server_side=True)
        except ssl.SSLError as e:
            met.append(str(e.reason))

    with service(handshake) as address:
        refused_by(address, NO_MASTER, address)
    assert met


def test_a_peers_data_port_is_no_master_and_the_peer_does_not_mind(cluster: Cluster) -> None:
    peers = cluster.members(2)
    epoch = cluster.reduce(peers)["epoch"]
    refused_by(peers[0].ask("secrets")["address"], pyccl.MasterUnavailableError, "it closed the connection")
    assert cluster.reduce(peers)["epoch"] == epoch


def test_silence_is_master_unavailable() -> None:
    with service(lambda conn: None) as address:
        refused_by(address, pyccl.MasterUnavailableError, "no master at")


def test_a_closed_door_is_master_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    with service(socket.socket.close) as address:
        refused_by(address, pyccl.MasterUnavailableError, "no master at")
    told = [record.getMessage() for record in caplog.records if "master_away" in record.getMessage()]
    assert told and all(f"address={address} cause=" in line and line.endswith("next=try_again") for line in told)
    assert len(told) == len(set(told)), "each cause once, however often it tried"


def test_a_refusal_is_passed_on_with_its_reason() -> None:
    with service(lambda conn: conn.sendall(envelope.pack(Rejected("not today")))) as address:
        refused_by(address, pyccl.RejectedError, "not today", reach_timeout=DEADLINE_S)


def test_a_master_of_another_version_is_a_protocol_error() -> None:
    with service(lambda conn: conn.sendall(envelope.pack(Welcome(99, "9", bytes(16), 1, 5000, False)))) as address:
        refused_by(address, pyccl.RemoteProtocolError, "protocol 99", reach_timeout=DEADLINE_S)


def test_strangers_at_the_master_cost_nobody_anything(cluster: Cluster) -> None:
    peers = cluster.members(2)
    host, port = cluster.master.address.rsplit(":", 1)
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\5hello", b"\xff" * 5000, b"\0\0\0\2\x91\x03"):
        with socket.create_connection((host, int(port))) as conn:
            conn.sendall(garbage)
            if garbage and garbage[0] != 0:
                conn.settimeout(DEADLINE_S)
                with suppress(ConnectionResetError):
                    assert conn.recv(1) == b""  # it hangs up
    before = cluster.reduce(peers)["epoch"]
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    assert cluster.reduce(peers)["epoch"] == before + 1
