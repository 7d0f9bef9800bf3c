"""Invites and the gate: what a token allows, what is remembered, and that nothing else lets anybody in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._proto import limits
from pyccl._proto.invites import Gate, Invite, RefusedError, open_untrusted, seal
from pyccl._proto.past import Admissions, Banned, Came, Past, Record, Revoked, Used, record_from_plain, record_to_plain

KEY, RUN = b"k" * 32, b"R" * 16
ALICE, BOB, CAROL = b"a" * 32, b"b" * 32, b"c" * 32
ID = b"12345678"
NOW, HOUR = 1_800_000_000, 3600


def gate(admissions: Admissions | None = None, key: bytes = KEY) -> Gate:
    return Gate(key, Admissions() if admissions is None else admissions)


def token(uses: int = 0, group: int | None = None, id_: bytes = ID, seconds: int = HOUR) -> bytes:
    return gate().issue(id_, RUN, NOW, seconds, uses, group, "label")


_INVITES = st.builds(
    Invite, st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), st.integers(0, 2**64 - 1),
    st.integers(0, limits.USES_MAX), st.none() | st.integers(0, limits.U32_MAX),
    st.text(st.characters(codec="utf-8"), max_size=16),
)  # fmt: skip


@given(_INVITES)
def test_a_token_says_what_was_sealed_and_fits_its_message(invite: Invite) -> None:
    sealed = seal(KEY, invite)
    assert open_untrusted(KEY, sealed) == invite
    assert len(sealed) <= limits.TOKEN_BYTES_MAX


@given(_INVITES, st.data())
def test_a_token_that_was_changed_anywhere_is_refused(invite: Invite, data: st.DataObject) -> None:
    sealed = bytearray(seal(KEY, invite))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RefusedError, match="altered"):
        open_untrusted(KEY, bytes(sealed))


@given(st.binary(max_size=limits.TOKEN_BYTES_MAX))
def test_whatever_else_comes_is_refused_and_raises_nothing_else(data: bytes) -> None:
    with pytest.raises(RefusedError):
        open_untrusted(KEY, data)


def test_a_token_of_another_master_is_refused() -> None:
    with pytest.raises(RefusedError, match="did not issue"):
        gate(key=b"K" * 32).admit(token(), ALICE, 0, RUN, NOW)


def test_a_token_ends_to_the_second() -> None:
    assert gate().admit(token(), ALICE, 0, RUN, NOW + HOUR - 1) == ()
    with pytest.raises(RefusedError, match="expired"):
        gate().admit(token(), ALICE, 0, RUN, NOW + HOUR)


def test_a_token_is_for_one_run_and_one_group_if_it_says_so() -> None:
    with pytest.raises(RefusedError, match="another run"):
        gate().admit(token(), ALICE, 0, b"S" * 16, NOW)
    with pytest.raises(RefusedError, match="for group 3, not 0"):
        gate().admit(token(group=3), ALICE, 0, RUN, NOW)
    assert gate().admit(token(group=0), ALICE, 0, RUN, NOW) == ()
    with pytest.raises(RefusedError, match="for group 0, not 1"):
        gate().admit(token(group=0), ALICE, 1, RUN, NOW)


def test_uses_count_identities_and_an_identity_once() -> None:
    door, sealed = gate(), token(uses=2)
    assert door.admit(sealed, ALICE, 0, RUN, NOW) == (Used(ID, NOW + HOUR, ALICE, NOW),)
    assert door.admit(sealed, ALICE, 0, RUN, NOW) == ()
    assert door.admit(sealed, BOB, 0, RUN, NOW) == (Used(ID, NOW + HOUR, BOB, NOW),)
    with pytest.raises(RefusedError, match="used up: 2 of 2"):
        door.admit(sealed, CAROL, 0, RUN, NOW)
    assert door.admit(sealed, ALICE, 0, RUN, NOW) == ()


def test_who_is_only_judged_uses_nothing() -> None:
    door, sealed = gate(), token(uses=1)
    door.judge(sealed, ALICE, RUN, NOW)
    assert door.admit(sealed, BOB, 0, RUN, NOW)


def test_a_revoked_invite_and_a_kicked_identity_stay_out() -> None:
    door = gate()
    assert len(door.revoke(ID, NOW)) == 1 and door.revoke(ID, NOW) == ()
    with pytest.raises(RefusedError, match="revoked"):
        door.admit(token(), ALICE, 0, RUN, NOW)
    assert door.admit(token(id_=b"another!"), ALICE, 0, RUN, NOW) == ()
    assert door.ban(ALICE) == (Banned(ALICE),) and door.ban(ALICE) == ()
    for attempt in (lambda: door.admit(token(id_=b"another!"), ALICE, 0, RUN, NOW), lambda: door.check_identity(ALICE)):
        with pytest.raises(RefusedError, match="kicked"):
            attempt()
    assert door.admit(token(id_=b"another!"), BOB, 0, RUN, NOW) == ()


def test_without_a_token_nobody_comes_in() -> None:
    with pytest.raises(RefusedError, match="no invite"):
        gate().judge(b"", ALICE, RUN, NOW)


def test_what_is_remembered_is_bounded_and_what_has_ended_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USED_MAX", "REVOKED_MAX", "BANNED_MAX"):
        monkeypatch.setattr(limits, name, 1)
    door = gate()
    door.admit(token(uses=1), ALICE, 0, RUN, NOW)
    later = gate().issue(b"later678", RUN, NOW, 3 * HOUR, 1, None, "")
    with pytest.raises(RefusedError, match="can't remember more uses"):
        door.admit(later, BOB, 0, RUN, NOW)
    assert door.admit(later, BOB, 0, RUN, NOW + HOUR)
    door.revoke(ID, NOW)
    with pytest.raises(RefusedError, match="can't remember more revoked"):
        door.revoke(b"other678", NOW)
    assert door.revoke(b"other678", NOW + limits.INVITE_S_MAX)
    door.ban(ALICE)
    with pytest.raises(RefusedError, match="can't remember more kicked"):
        door.ban(BOB)


def test_whose_a_peer_is_is_remembered_of_so_many_and_of_who_is_in_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CAME_MAX", 3)
    door, peers, is_in = gate(), [bytes([n]) * 16 for n in range(6)], {bytes([0]) * 16, bytes([2]) * 16}
    for n, peer in enumerate(peers[:5]):
        assert door.came(peer, ALICE if n else BOB, is_in.__contains__)
        assert not door.came(peer, ALICE if n else BOB, is_in.__contains__)  # nothing new
    assert door.identity_of(peers[0]) == BOB and door.peers_of(ALICE) == [peers[2], peers[4]]
    assert door.came(peers[5], CAROL, lambda peer: True)
    assert door.identity_of(peers[0]) is None and door.peers_of(CAROL) == [peers[5]]


def test_a_journal_remembers_what_the_gate_does() -> None:
    """After each record the gate of a master that reads it refuses for the same reasons."""
    kept, past = Admissions(), Past(RUN, 1)
    door = gate(kept)
    records: list[Record] = [*door.admit(token(uses=1), ALICE, 0, RUN, NOW)]
    records += door.revoke(b"revoked!", NOW)
    records += door.ban(CAROL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CAME_MAX", 2)
        for n, identity in enumerate((ALICE, BOB, ALICE)):
            records += door.came(bytes([n]) * 16, identity, lambda peer: False)
    assert [type(record) for record in records] == [Used, Revoked, Banned, Came, Came, Came]
    for record in records:
        past.apply(record_from_plain(record_to_plain(record)))
    again = Past.from_plain(past.to_plain())
    assert again.admissions == kept and past.copy().admissions == kept
    door = gate(again.admissions)
    for sealed, identity, reason in (
        (token(uses=1), BOB, "used up"),
        (token(id_=b"revoked!"), BOB, "revoked"),
        (token(id_=b"another!"), CAROL, "kicked"),
    ):
        with pytest.raises(RefusedError, match=reason):
            door.admit(sealed, identity, 0, RUN, NOW)


def test_a_label_is_one_printable_line_of_bounded_length() -> None:
    sealed = gate().issue(ID, RUN, NOW, HOUR, 0, None, "\x1b[2J\nä" + "𝕏" * 32)
    label = open_untrusted(KEY, sealed).label
    assert label.startswith("?[2J?ä") and label.isprintable() and len(label.encode()) <= 64
