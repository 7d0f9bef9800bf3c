"""What others send is shown on a line of its own, and moves no cursor; what is no status is said to be none."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from click.testing import CliRunner, Result

from pyccl._io import envelope
from pyccl._proto.messages import Message, Rejected, Status, Welcome
from pyccl.cli import log as logs
from pyccl.cli.status import status

DEADLINE_S = 60.0
EVIL = "a\n2031-01-01T00:00:00.000Z INFO pyccl.master forged=1\x1b[2J\r\u202e\ud800"


def test_a_log_line_stays_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "root", root := logging.RootLogger("WARNING"))
    monkeypatch.setattr(logging.getLogger("trio.serve_listeners"), "filters", [])
    logs.configure("info")
    root.handle(root.makeRecord("pyccl.master", logging.INFO, "", 0, "peer_pending library=%s", (EVIL,), None))
    try:
        raise OSError("two\nlines")
    except OSError as e:
        given = (type(e), e, e.__traceback__)
    root.handle(root.makeRecord("pyccl.master", logging.ERROR, "", 0, "failed", (), given))
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith(r"library=a\n2031-01-01T00:00:00.000Z INFO pyccl.master forged=1\x1b[2J\r\u202e\ud800")
    assert second.endswith("pyccl.master failed") and traceback[0].startswith("Traceback")


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serves one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as conn:
                conn.settimeout(DEADLINE_S)
                with suppress(OSError):
                    behave(conn)
                    while conn.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(DEADLINE_S)


def ask(address: str, *options: str) -> Result:
    return CliRunner().invoke(status, [address, *options])


def answers(message: Message) -> Callable[[socket.socket], None]:
    return lambda conn: conn.sendall(envelope.pack(message))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Status("{}"), "is no status of this version"),
        (Status('{"run": 1, "library": "x", "peer_timeout_s": "y", "groups": [3]}'), "is no status of this version"),
        (Status('{"run": "a", "library": "x", "peer_timeout_s": 1, "groups": 3}'), "is no status of this version"),
        (Status("[" * 100_000), "is no JSON"),
        (Status("no"), "is no JSON"),
        (Status("[]"), "is no object"),
        (Rejected("go\x1b[2J\naway"), r"go\x1b[2J\naway"),
        (Welcome(1, "x", bytes(16), 1, 5000, False), "answered with Welcome"),
    ],
)
def test_status_says_what_is_wrong_with_an_answer(answer: Message, said: str) -> None:
    with server(answers(answer)) as address:
        result = ask(address)
    assert (result.exit_code, result.exception.__class__) == (3, SystemExit), result.output
    assert said in result.output and "\x1b" not in result.output


@pytest.mark.parametrize(
    "hello",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.7\r\n", b"\x15\x03\x01\x00\x02\x02\x32", b"\0\0\0\1\xc0"],
    ids=["HTTP", "SSH", "TLS alert", "no message"],
)
def test_status_of_another_service_is_an_error_and_no_traceback(hello: bytes) -> None:
    with server(lambda conn: conn.sendall(hello)) as address:
        result = ask(address)
    assert result.exit_code == 3 and "Error" not in result.output, result.output
    assert f"{address} does not speak pyccl" in result.output


def test_status_of_a_silent_a_closed_and_an_unknown_address() -> None:
    with server(lambda conn: None) as address:
        assert "did not answer within 0.2 s" in ask(address, "--timeout", "0.2").output
    assert "no master answers" in (result := ask(address)).output and result.exit_code == 3
    for name in ("no-such-host.invalid:1", "a..b:1"):
        assert (result := ask(name)).exit_code == 3 and name in result.output


def test_status_shows_foreign_text_on_its_own_line() -> None:
    peer = {
        "peer": "ab" * 16, "addresses": [EVIL], "library": EVIL, "connected": True, "heard_ago_s": 0.0,
        "at_safe_point": False, "blocked": False, "lost": EVIL, "complaints": {},
        "paths": {EVIL: EVIL},
    }
    ballot = {"undecided": EVIL, "waits_for": []}
    group = {
        "group": 0, "epoch": 1, "members": [peer], "pending": [], "deciding": True, "ballot": ballot, "proposal": None,
    }
    journal = {"kept": True, "waiting": 1, "error": EVIL}
    event = {"event": "x", "ago_s": 1.0, "reason": EVIL}
    told = {
        "run": "r", "library": EVIL, "peer_timeout_s": 5.0, "journal": journal, "needs_majority": False,
        "groups": [group], "gone": {}, "events": [event],
        "observers": [{"peer": EVIL, "group": EVIL, "addresses": [EVIL]}],
    }
    with server(answers(Status(json.dumps(told)))) as address:
        result = ask(address)
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert len(result.output.splitlines()) == 9
