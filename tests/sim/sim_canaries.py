"""Bugs that the simulator must find: each is a known way to break the protocol, planted into a copy of the code.

A canary replaces text that stands exactly once in one file. The sources stay as they ship, and a canary whose text is
gone fails its test. Python: the changed text is what gets imported. C: the operation machine is compiled with it into
a library of its own, which only the simulator loads (sim_native.py).
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
OP_FSM: Final = "PYCCL_SIM_OP_FSM"  # of sim_native, which is not to be imported before
BUILT: Final = ROOT / "build" / "sim"
C_SOURCES: Final = ("op_fsm.c", "map.c", "status.c", "frame.c")


@dataclass(frozen=True)
class Canary:
    name: str
    file: str
    text: str
    changes: tuple[tuple[str, str], ...]
    saved: bool = False  # runs with saved states show it
    first: int = 0  # the hunt begins there: of a bug that few seeds show

    @property
    def language(self) -> str:
        return "C" if self.file.endswith(".c") else "Python"

    def planted(self, source: str) -> str:
        for old, new in self.changes:
            if source.count(old) != 1:
                raise ValueError(f"canary {self.name}: {self.file} holds {source.count(old)} times: {old}")
            source = source.replace(old, new)
        return source


_MASTER: Final = "pyccl/_proto/master.py"
_MEMBER: Final = "pyccl/_proto/member.py"
_RESTORING: Final = "pyccl/_proto/restoring.py"
_FSM: Final = "native/src/op_fsm.c"

_ALL: Final = (
    Canary(
        "skip_flush",
        _MASTER,
        "a loss epoch is decided before the survivors have frozen and reported",
        (("if not all(has_reported(self._peers[key], ballot) for key in ballot.members):\n", "if False:\n"),),
    ),
    Canary(
        "report_without_freezing",
        _FSM,
        "a report does not freeze: DATA and DONE still change outcomes behind it",
        (("    fsm->frozen = fsm->entered;\n", ""),),
    ),
    Canary(
        "abort_after_done",
        _FSM,
        "an operation whose DONE has left fails alone at its deadline",
        (
            (
                "    if (!op->asked) {\n",
                (
                    "    if (!fsm->frozen) {\n"
                    "        send_all(fsm, op->tag, op->seq, PYCCL_FRAME_ABORT, (uint64_t)-PYCCL_ERR_DEADLINE, NULL);\n"
                    "        op_fail(fsm, op, PYCCL_ERR_DEADLINE, NULL, now_ns);\n"
                    "        return;\n"
                    "    }\n"
                    "    if (!op->asked) {\n"
                ),
            ),
        ),
    ),
    Canary(
        "accept_stale_epoch",
        _FSM,
        "frames of an older epoch count in the current one",
        (
            (
                "    if (epoch_number < fsm->epoch_number) return PYCCL_GATE_DROP;\n",
                "    if (epoch_number < fsm->epoch_number) return member ? PYCCL_GATE_PASS : PYCCL_GATE_DROP;\n",
            ),
        ),
    ),
    Canary(
        "majority_done",
        _FSM,
        "DONE from more than half of the members is taken for DONE from all",
        (
            (
                "op->state == PREPARED && set_is_full(fsm, op->tag, &op->done)",
                "op->state == PREPARED && 2 * __builtin_popcountll(op->done.word[0]) > (int)fsm->world",
            ),
            (
                "liar = first_that_differs(fsm, op);",
                "liar = set_is_full(fsm, op->tag, &op->done) ? first_that_differs(fsm, op) : fsm->world;",
            ),
        ),
    ),
    Canary(
        "forget_journal",
        "tests/sim/sim_master.py",
        "a master that starts again knows the run and none of its epochs",
        (("            past=past,\n", "            past=Past(past.run, past.term),\n"),),
    ),
    Canary(
        "send_before_fsync",
        _MASTER,
        "an epoch is committed before its record is durable",
        (
            ("self._writing.append((self._ticket_last, group))", "self._writing.append((self._ticket_last, None))"),
            (
                "        elif group is not None:\n            self._commit_epoch(group)\n",
                "        if group is not None:\n            self._commit_epoch(group)\n",
            ),
        ),
    ),
    Canary(
        "starts_unwritten",
        "tests/sim/sim_master.py",
        "a master starts although the journal has no room for its start",
        (("            self.written = [began]\n            return None\n", "            return past\n"),),
    ),
    Canary(
        "admit_twice",
        _MASTER,
        "a second incarnation is admitted beside the first of the same peer",
        (
            (
                "        newcomers = [record for record in self._pending(group) if record.peer not in taken]\n",
                "        newcomers = [record for record in self._pending(group) if taken]\n",
            ),
        ),
    ),
    Canary(
        "readmit_evicted",
        _MASTER,
        "an incarnation that is out of the run comes back into it",
        (("elif record is None and (hello.resume is not None or key in self._gone):", "elif False:"),),
    ),
    Canary(
        "verdict_of_some",
        "pyccl/_proto/ballot.py",
        "what some survivors have prepared is committed although others still run it",
        (("    if len(entries) < survivors or any(", "    if any("),),
    ),
    Canary(
        "hearsay_evicts",
        "pyccl/_proto/suspicion.py",
        "one complaint evicts, whatever the master itself hears",
        (("        if silent_s < peer_timeout:\n", "        if False:\n"),),
    ),
    Canary(
        "blame_others",
        _MASTER,
        "the master takes a failure of its own line for the silence of all members",
        (("since = self._now if quiet else self._line_since", "return Line(0.0, 0.0)"),),
    ),
    Canary(
        "resume_in_silence",
        _MEMBER,
        "a member whose control connection came back does not say again what it said before",
        (("return [effect for message in again for effect in self._send(message, now)]", "return []"),),
    ),
    Canary(
        "no_verdicts",
        _MEMBER,
        "an epoch is entered without the verdicts of the flush",
        (("        verdicts = () if newcomer else message.verdicts", "        verdicts = ()"),),
    ),
    Canary(
        "done_while_frozen",
        _FSM,
        "a frozen member still prepares and commits",
        (
            (
                "op_advance(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns) {\n    if (fsm->frozen) return;\n",
                "op_advance(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns) {\n",
            ),
            (
                "if (op == NULL || op->state != RUNNING || fsm->frozen) return;  /* frozen: the attempt",
                "if (op == NULL || op->state != RUNNING) return;  /* frozen: the attempt",
            ),
            ("    if (fsm->frozen) return PYCCL_OK;\n", ""),
        ),
    ),
    Canary(
        "no_resend",
        _FSM,
        "a link that came back repeats nothing",
        (("if (!fsm->entered || fsm->frozen) return;  /* frozen: the next", "return;  /* frozen: the next"),),
        first=48,
    ),
    Canary(
        "deaf_to_abort",
        _FSM,
        "ABORT is not heard",
        (
            (
                "case PYCCL_FRAME_ABORT: rc = on_abort(fsm, message, now_ns); break;",
                "case PYCCL_FRAME_ABORT: break;",
            ),
        ),
    ),
    Canary(
        "no_tombstone",
        _FSM,
        "who has failed an operation does not say so to those who try it again",
        (("        tell_failed(fsm, op, message->rank);\n        break;\n", "        break;\n"),),
    ),
    Canary(
        "no_commit_record",
        _FSM,
        "a committed operation is forgotten before the others are known to have settled it",
        (
            (
                "now_ns);\n    if (set_is_full(fsm, op->tag, &op->settled)) op_drop(fsm, op);\n",
                "now_ns);\n    op_drop(fsm, op);\n",
            ),
        ),
    ),
    Canary(
        "early_drained",
        _FSM,
        "a member is ready for the next epoch before its operations have ended",
        (("    if (!fsm->cutting || fsm->live_count != 0) return 0;\n", "    return fsm->cutting;\n"),),
    ),
    Canary(
        "mixes_pairs",
        "tests/sim/sim_engine.py",
        "early bytes of one partner are taken for those of another with the same tag and number",
        (("        return int(lib.pyccl_channel(space, tag, self.rank, rank))\n", "        return tag\n"),),
    ),
    Canary(
        "stale_votes",
        _RESTORING,
        "a state from a file votes although nobody else has agreed to it",
        (("    return restored, not restored\n", "    return restored, True\n"),),
        saved=True,
    ),
    Canary(
        "offers_the_last",
        _RESTORING,
        "an observer offers what it wrote last, which may be older",
        (("key=lambda one: (one.revision, one.written_ns)", "key=lambda one: one.written_ns"),),
        saved=True,
    ),
    Canary(
        "offers_damaged",
        "tests/sim/sim_saved.py",
        "an observer does not look again at a file that was fetched from it",
        (("                offer.observer.fetched()\n", ""),),
        saved=True,
    ),
    Canary(
        "asks_nobody",
        _RESTORING,
        "members that come back without a vote do not ask the observers they know",
        (("    return nobody_votes(records) and any(record.asks for record in records)\n", "    return False\n"),),
        saved=True,
    ),
    Canary(
        "forgets_the_offer",
        _RESTORING,
        "what observers offer need not be held at the election if a member held as much, though it may be lost since",
        (
            (
                "    return max(0, most - 1), members[told.index(most)] if most - 1 > newest_held else None\n",
                "    return (most - 1, members[told.index(most)]) if most - 1 > newest_held else (0, None)\n",
            ),
        ),
        saved=True,
    ),
    Canary(
        "drops_the_newest",
        _RESTORING,
        "an observer keeps its last files and not the newest revision",
        (("    return [one for one in kept[:-keep] if one is not stays]\n", "    return [*kept[:-keep]]\n"),),
        saved=True,
    ),
)
CANARIES: Final = {canary.name: canary for canary in _ALL}


def plant(canary: Canary) -> None:
    """In this process, before anything it changes is imported."""
    if canary.language == "C":
        os.environ[OP_FSM] = str(_build(canary))
        return
    name = canary.file.removeprefix("tests/sim/").removesuffix(".py").replace("/", ".")
    assert name not in sys.modules, name
    sys.meta_path.insert(0, _Finder(name, canary))


def _build(canary: Canary) -> Path:
    """The library with the planted machine; compiled once for each text."""
    native = ROOT / "native"
    text = canary.planted((ROOT / canary.file).read_text(encoding="utf-8"))
    others = [native / "src" / name for name in C_SOURCES if not canary.file.endswith(name)]
    digest = hashlib.sha256(text.encode())
    for path in [*others, *sorted(native.glob("*/*.h"))]:
        digest.update(path.read_bytes())
    BUILT.mkdir(parents=True, exist_ok=True)
    built = BUILT / f"{canary.name}-{digest.hexdigest()[:16]}.so"
    if built.exists():
        return built
    source, making = BUILT / f"{canary.name}-{os.getpid()}.c", built.with_suffix(f".{os.getpid()}")
    source.write_text(text, encoding="utf-8")
    try:
        subprocess.run(
            [
                *(os.environ.get("CC", "cc"), "-std=c11", "-O1", "-w", "-shared", "-fPIC", "-Wl,-z,lazy"),
                *("-D_GNU_SOURCE", '-DPYCCL_VERSION="canary"', f"-I{native / 'include'}", f"-I{native / 'src'}"),
                *(str(source), *map(str, others), "-o", str(making)),
            ],
            check=True,
        )
        making.rename(built)
    finally:
        source.unlink()
    return built


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, canary: Canary) -> None:
        super().__init__(name, path)
        self.canary = canary

    def get_code(self, fullname: str) -> CodeType:
        text = self.canary.planted(Path(self.path).read_text(encoding="utf-8"))
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, canary: Canary) -> None:
        self.name, self.canary = name, canary

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin is not None, fullname
        spec.loader = _Loader(fullname, spec.origin, self.canary)
        return spec
