"""What a flush decides: a pure function of the survivors' reports. Rules: design.md 5, model/commit_model.cpp.

Why it is right: a report freezes its sender, so nobody commits between the report and the verdict.  Who committed had
DONE from everybody, so all survivors hold the result (prepared, or beyond); and where all survivors are prepared all
hold the result.  In every other case somebody holds none and nobody has committed: it is run again.  "Everybody" and
"survivors" are those whom the operation concerns: of an exchange the pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pyccl._proto.channel import participants
from pyccl._proto.messages import Key, OpReport, OpState, OpVerdict, Verdict

_HOLDS: Final = (OpState.PREPARED, OpState.COMMITTED)


def decide(reports: Mapping[bytes, tuple[OpReport, ...]], members: Sequence[bytes]) -> tuple[OpVerdict, ...]:
    """Verdicts in the order of the keys. No verdict: run it again; a member that does not name it still runs it.

    members: of the epoch that ends, in rank order; `reports` are those of its survivors.
    """
    said: dict[Key, list[OpReport]] = {}
    for ops in reports.values():
        for op in ops:
            said.setdefault(op.key, []).append(op)
    verdicts = (
        (key, _decide_one(entries, sum(peer in reports for peer in participants(key.space, key.tag, members))))
        for key, entries in sorted(said.items())
    )
    return tuple(OpVerdict(*key, verdict) for key, verdict in verdicts if verdict is not None)


def _decide_one(entries: list[OpReport], survivors: int) -> int | None:
    if any(entry.state == OpState.COMMITTED for entry in entries):
        return Verdict.COMMIT
    if len(entries) < survivors or any(entry.state not in _HOLDS for entry in entries):
        return None
    return Verdict.COMMIT if len({entry.hash for entry in entries}) == 1 else Verdict.FAIL
