"""Group: who takes part, and that all of them hold and mean the same.

The calls here are collective. Every member makes them at the same place of its round:
    agree           records of all (settings, who is new) are compared, then the shared state is synchronised
    admit           a safe point, and agree; where the last exchange told that newcomers wait
    gather_company  safe points until there are ``min_peers``
A newcomer comes out of ``connect()`` into agree, which is where the members are when they come out of the safe point.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pyccl import errors
from pyccl._io.statesync import SyncInfo
from pyccl.communicator import Communicator
from pyccl.optim.exchange import ATTEMPTS_MAX, RETRIED, TAG_RECORDS, Vow
from pyccl.state import FAST, SharedState

_RECORD_BYTES: Final = 4096
_VALUE_CHARS_MAX: Final = 64  # longer settings travel as their digests
_POLL_S: Final = 0.05  # between two looks for newcomers while there are too few members

log = logging.getLogger("pyccl.optim")


@dataclass(slots=True)
class Stats:
    """What an optimizer has done here since it was made.

    rounds: outer steps (LocalSGD: averages) that were committed. inner_steps: calls of ``step()`` that counted.
    tx_bytes, rx_bytes: payload of exchanges, and of shared state. seconds_blocked: in which ``step()`` waited for
    others. seconds_hidden: in which an exchange ran while the caller did something else. retries: exchanges that had to
    run again because a member was lost or gave up. rollbacks: rounds that were not committed: there were too few, or an
    error ended them. syncs: of shared state.
    """

    rounds: int = 0
    inner_steps: int = 0
    tx_bytes: int = 0
    rx_bytes: int = 0
    seconds_blocked: float = 0.0
    seconds_hidden: float = 0.0
    retries: int = 0
    rollbacks: int = 0
    syncs: int = 0

    @property
    def bytes(self) -> int:
        """Sent and received."""
        return self.tx_bytes + self.rx_bytes


@dataclass(frozen=True, slots=True)
class _Record:
    """What a member tells the others about itself."""

    is_new: bool
    settings: Mapping[str, str]
    parts: Mapping[str, str]
    tells: Mapping[str, str]


@dataclass(slots=True)
class Group:
    """The members of a communicator's peer group that run one optimizer.

    Args:
        comm: connected by the time of the first collective call.
        state: the shared state; arrays are named PART/NAME.
        settings: name -> text, equal on all members.
        min_peers: fewer do not advance.
        more: further states to synchronise after `state`, as they are then.
        tells: what the others are to know of this member at each agree; it need not be equal. In `told`, by peer.
        per_replica: the members' arrays differ by design: a newcomer takes those of one of them.
    """

    comm: Communicator
    state: SharedState
    settings: Mapping[str, str]
    min_peers: int
    stats: Stats
    more: Callable[[], Sequence[SharedState]] = tuple
    tells: Callable[[], Mapping[str, str]] = dict
    told: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    per_replica: bool = False
    _in_step: object = None  # the membership (session) of the last agree
    keeps_own: bool = False  # per replica: what is here is ours to keep
    _known: frozenset[str] = frozenset()  # members at the last agree
    _veterans: frozenset[str] = frozenset()  # of them, who was in step before
    _settings_digest: int = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {name: _short(value) for name, value in sorted(self.settings.items())}
        self._settings_digest = _number(hashlib.sha256(json.dumps(self.settings).encode()).digest())

    @property
    def is_new(self) -> bool:
        """Not in step with anybody yet, since it connected, or since it loaded a checkpoint."""
        return self._in_step is None or self._in_step is not self.comm._session

    # ---- collective

    def agree(self) -> bool:
        """Bring all members in step. Returns whether arrays here were replaced.

        Raises:
            MismatchError: settings differ: on those newcomers whose settings are not the members', who leave the run;
                if all are new, on all. Or the arrays of somebody who was in step were not the others': on all, after
                they have been replaced.
        """
        self.comm.members  # noqa: B018  an error of the session comes before anything else
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                changed = self._agree()
            except RETRIED as e:
                if attempt == ATTEMPTS_MAX or isinstance(e, StatesDifferedError) or self._left():
                    raise
                log.warning("agree_again cause=%r", e)
                continue
            return changed
        raise AssertionError("unreachable")

    def admit(self) -> bool:
        """The safe point: lets in who waits, and agrees. Returns whether arrays here were replaced.

        Without a master nobody is let in: the run goes on as it is.
        """
        try:
            self.comm.update_topology()
        except (errors.MasterUnavailableError, errors.MismatchError, errors.DeadlineError) as e:
            log.warning("no_safe_point cause=%r", e)
            return False
        return self.comm.group_world_size > 1 and self.agree()

    def gather_company(self) -> bool:
        """Wait until there are ``min_peers``. Returns whether arrays here were replaced."""
        changed = False
        while self.comm.group_world_size < self.min_peers:
            if self.comm.group_world_size == 1 or self._anybody_pending():
                changed |= self.admit()  # the master lets a lone member wait for company
            else:
                time.sleep(_POLL_S)
        return changed

    def start(self) -> bool:
        """Come in step with the members, and wait until there are enough. Returns whether arrays were replaced."""
        changed = self.comm.group_world_size > 1 and self.agree()
        changed |= self.gather_company()
        if self.is_new:
            changed |= self.agree()
        return changed

    def has_strangers(self) -> bool:
        """Whether a safe point that the program called itself has let somebody in: then agree. Equal on all members."""
        members = frozenset(self.comm.members)
        self._known &= members
        return not members <= self._known

    def explain(self) -> errors.MismatchError:
        """After an exchange whose vow was broken: who differs from the others, and in what. Collective."""
        records = self._records(self._parts())
        self._check_settings(records)
        odd, fields = _odd({peer: record.parts for peer, record in records.items()}, records)
        if not odd:
            return StatesDifferedError("the members' states differed, and agree now", tuple(records), ("state",))
        return StatesDifferedError(
            f"{_peers(odd)} held another state than the others, in {', '.join(fields)}", odd, fields
        )

    def show(self) -> None:
        """Somebody watches: a sync, which observers take new revisions from. It may fail; the next will do."""
        try:
            self._sync()
        except RETRIED as e:
            log.warning("not_shown cause=%r", e)

    # ---- local

    def vow(self) -> Vow:
        """What must be equal now, for an exchange to carry."""
        words = [self._settings_digest, self.state.revision]
        if not self.per_replica:
            words.append(_number(self._digest(list(self.state.compared.values()))))
        return Vow(tuple(words), self.comm._pending_known > 0, self.comm._is_watched)

    def rejoin(self) -> None:
        """This peer was taken out of the run: come back as a newcomer."""
        log.warning("rejoin cause=%r", self._left())
        self.keeps_own = False
        self.comm.connect()

    def loaded(self) -> None:
        """The state comes from a file, as everybody's does: the newest wins."""
        self.state.voter = self._in_step = None
        self.keeps_own = self.per_replica

    # ---- inside

    def _left(self) -> BaseException | None:
        session = self.comm._session
        return None if session is None else session.error

    def _anybody_pending(self) -> bool:
        try:
            return self.comm.are_peers_pending()
        except RETRIED:
            return False  # asked again

    def _agree(self) -> bool:
        records = self._records({})
        self._check_settings(records)
        self.told = {peer: record.tells for peer, record in records.items()}
        info = self._sync()
        changed = info is not None and bool(info.changed)
        for state in self.more():
            self._count(self.comm.sync_shared_state(state))
        self._known = frozenset(self.comm.members)
        self._in_step, self.keeps_own = self.comm._session, self.per_replica
        if info is None:
            return False
        veterans = self._veterans - frozenset(info.holders)
        wrong = sorted(veterans & frozenset(info.members))
        if wrong and not self.per_replica:
            raise StatesDifferedError(
                f"{_peers(wrong)} did not hold what the others agree on", tuple(wrong), ("state",)
            )
        return changed

    def _sync(self) -> SyncInfo | None:
        """None: the others' arrays are another one's, and ours stay."""
        try:
            info = self.comm.sync_shared_state(self.state, "send_only" if self.keeps_own else "enforce_popular")
        except errors.MismatchError as e:
            if self.keeps_own and e.peers == (self.comm.peer_id,) and e.fields == ("root",):
                return None
            raise
        self._count(info)
        return info

    def _count(self, info: SyncInfo) -> None:
        self.stats.syncs += 1
        self.stats.tx_bytes += info.tx_bytes
        self.stats.rx_bytes += info.rx_bytes

    def _records(self, parts: Mapping[str, str]) -> dict[str, _Record]:
        mine = {"new": self.is_new, "settings": self.settings, "parts": parts, "tells": self.tells()}
        packed = json.dumps(mine, sort_keys=True).encode()
        assert len(packed) <= _RECORD_BYTES, "settings are short"
        padded = np.frombuffer(packed.ljust(_RECORD_BYTES), np.uint8)
        try:
            gathered, info = self.comm._all_gather_async(padded, tag=TAG_RECORDS).wait()
            members = info.members
        except errors.AloneError:
            gathered, members = padded[None], (self.comm.peer_id,)
        return {peer: _decode_untrusted(peer, row.tobytes()) for peer, row in zip(members, gathered, strict=True)}

    def _check_settings(self, records: Mapping[str, _Record]) -> None:
        self._veterans = frozenset(peer for peer, record in records.items() if not record.is_new)
        odd, fields = _odd({peer: record.settings for peer, record in records.items()}, records)
        if not odd:
            return
        me = self.comm.peer_id
        if self._veterans and me not in odd:
            log.warning("newcomers_differ peers=%s fields=%s", _peers(odd), ",".join(fields))
            return
        told = "; ".join(
            f"{name} is {', '.join(f'{record.settings.get(name)} on {peer[:8]}' for peer, record in records.items())}"
            for name in fields
        )
        if self._veterans:
            self.comm.close()  # the run goes on without this peer, instead of waiting for it
        raise StatesDifferedError(f"the members' optimizers differ: {told}", odd, fields)

    def _parts(self) -> dict[str, str]:
        """Digests of the arrays by the first half of their names."""
        parts: dict[str, list[Any]] = {}
        for name, array in self.state.compared.items():
            parts.setdefault(name.partition("/")[0], []).append(array)
        digests = {part: self._digest(arrays).hex() for part, arrays in parts.items()}
        return digests | {"revision": str(self.state.revision)}

    def _digest(self, arrays: list[Any]) -> bytes:
        return hashlib.sha256(FAST.table(arrays)).digest()[:16]


class StatesDifferedError(errors.MismatchError):
    """Members' settings or states were not equal. Not to be tried again."""


def _short(value: str) -> str:
    return value if len(value) <= _VALUE_CHARS_MAX else hashlib.sha256(value.encode()).hexdigest()[:16]


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def _peers(peers: Sequence[str]) -> str:
    return ", ".join(peer[:8] for peer in peers)


def _odd(
    told: Mapping[str, Mapping[str, str]], records: Mapping[str, _Record]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who differs from what most say (of those who are not new, if there are any), and in which fields."""
    voters = [peer for peer in told if not records[peer].is_new] or list(told)
    kinds = Counter(json.dumps(dict(told[peer]), sort_keys=True) for peer in voters)
    right = json.loads(min(kinds, key=lambda kind: (-kinds[kind], kind)))
    odd = tuple(peer for peer in told if dict(told[peer]) != right)
    fields = {name for peer in odd for name in {*right, *told[peer]} if told[peer].get(name) != right.get(name)}
    return odd, tuple(sorted(fields))


def _decode_untrusted(peer: str, data: bytes) -> _Record:
    """What a member sent. RemoteProtocolError: it is no record."""
    try:
        told = json.loads(data)
        new, settings, parts, tells = told["new"], told["settings"], told["parts"], told["tells"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise errors.RemoteProtocolError(f"optimizer record of {peer[:8]}: {e!r}") from e
    for texts in (settings, parts, tells):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise errors.RemoteProtocolError(f"optimizer record of {peer[:8]}: texts are needed")
    if not isinstance(new, bool):
        raise errors.RemoteProtocolError(f"optimizer record of {peer[:8]}: new is {type(new).__name__}")
    return _Record(new, settings, parts, tells)
