#!/usr/bin/env python3
"""Write proto/vectors/messages.txt: ``python tools/make_message_vectors.py [--check]``.

Each line is NAME ok|refused BODY: the msgpack body of a control message (proto/wire.md 2 and 4) in hexadecimal. The
bodies are written by hand as plain arrays, not by ``pyccl``, so that the code is not its own judge. What is refused
is wrong in one place only. ``--check`` writes nothing and fails when the file is not what this script would write.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack

PATH = Path(__file__).resolve().parents[1] / "proto" / "vectors" / "messages.txt"

RUN, PEER_A, PEER_B = b"R" * 16, b"A" * 16, b"B" * 16
INC_A, INC_B, ZERO = b"a" * 16, b"b" * 16, bytes(16)
ADDRESSES = [["127.0.0.1", 48149, 0], ["peer.example", 65535, 3]]
MEMBER_A = [PEER_A, INC_A, ADDRESSES, "192.0.2.7"]
MEMBER_B = [PEER_B, INC_B, [], ""]
SPEC = bytes(40)
SIGNED = b"s" * 64
U32, U64 = 2**32 - 1, 2**64 - 1
PAIR_0_1 = 7 | 0 << 32 | 1 << 40  # tag 7 of the members of rank 0 and 1
PAIR_LAST = U32 | 254 << 32 | 255 << 40

Body = list[object]


def plan(shares: tuple[int, ...] = (), ring: tuple[int, ...] = (), **head: int) -> bytes:
    """Of an epoch with two members, right or wrong."""
    flags = head.get("flags", bool(shares) + 2 * bool(ring))
    numbers = head.get("version", 1), flags, head.get("members", 2), head.get("ring_from", U64), head.get("pace", 0)
    return struct.pack("<BBHQI", *numbers) + struct.pack(f"<{len(shares)}I{len(ring)}H", *shares, *ring)


def epoch(
    number: int = 1, previous: bytes = ZERO, peers: str = "AB", flip: int = 0, plan: bytes = b""
) -> Body:
    """An epoch as it travels, its id by proto/wire.md 4."""
    members = [{"A": MEMBER_A, "B": MEMBER_B}[peer] for peer in peers]
    content = previous + struct.pack("<QQI", 7, number, len(members))
    for peer, incarnation, *_ in members:
        content += peer + incarnation
    ident = bytearray(hashlib.sha256(content + plan).digest()[:16])
    ident[0] ^= flip
    return [number, bytes(ident), previous, 7, members, plan]


GOOD: dict[str, Body] = {
    "hello": [1, 1, "0.1.0", 0, PEER_A, INC_A, ADDRESSES, None],
    "hello_resume": [1, 1, "0.1.0", U32, PEER_A, INC_A, [], [RUN, 3, b"E" * 16, True, 7]],
    "hello_other_version": [1, 99, "9", 0, PEER_A, INC_A, [], None],
    "pulse": [2, 1, PEER_A, INC_A],
    "heartbeat": [3],
    "leave": [4],
    "arrive": [5, 1, [[0, 0, 3], [1, U32, U64]]],
    "arrive_nothing_submitted": [5, U64, []],
    "arrive_pairs": [5, 1, [[2, PAIR_0_1, 3], [2, PAIR_LAST, U64]]],
    "withdraw": [6, 1],
    "ready": [7, 2, 1],
    "behind": [8, 2, 1, [[0, 5, 9]]],
    "unreachable": [9, 2, 1, [PEER_B], "connection refused"],
    "suspect_silent": [10, PEER_B, "silent", "5.0 s"],
    "suspect_refused": [10, PEER_B, "refused", ""],
    "suspect_protocol": [10, PEER_B, "protocol", "bad magic"],
    "trust": [11, PEER_B],
    "report": [12, 1, 1, [[0, 0, 0, 1, 0], [0, 0, 1, 2, U64], [1, 9, 0, 3, 1], [1, 9, 1, 4, 0]]],
    "report_of_a_pair": [12, 1, 1, [[2, PAIR_0_1, 0, 2, U64]]],
    "settle": [13, 1],
    "blocked": [14, 1, [[0, 0, 4]], True, False],
    "blocked_in_a_pair": [14, 1, [[2, PAIR_0_1, 4]], False, False],
    "unblocked": [15, 1],
    "differs": [16, 1, [0, 0, 4], PEER_B, SPEC, SPEC],
    "differs_in_a_pair": [16, 1, [2, PAIR_0_1, 4], PEER_B, SPEC, SPEC],
    "entered": [17, 1],
    "status_ask": [18, 1],
    "recall_verdict_of_a_pair": [19, RUN, 7, epoch(2, b"E" * 16), "loss", [[2, PAIR_0_1, 4, 1]], "", 2, True, b"", b""],
    "recall": [19, RUN, 7, epoch(2, b"E" * 16), "loss", [[0, 0, 4, 1]], "", 2, True, SIGNED, SIGNED],
    "measured": [21, 10**13, 7, 10**13, 9, [[PEER_A, 10**13, 0, 60_000_000, 3, PEER_B], [PEER_B, 5, 1, 4, 0, ZERO]]],
    "measured_nothing": [21, 0, 0, 0, 0, []],
    "join": [22, b"K" * 32, b"S" * 16, b"T" * 256, b"s" * 64],
    "join_without_an_invite": [22, b"K" * 32, b"S" * 16, b"", b"s" * 64],
    "invite_ask": [23, 366 * 86_400, 1024, U32, "x" * 32],
    "invite_ask_for_any_group": [23, 1, 0, None, ""],
    "revoke": [24, b"I" * 8],
    "peers_ask": [25],
    "kick": [26, PEER_B],
    "reflect": [27, 1, PEER_A, INC_A],
    "addresses": [28, ADDRESSES],
    "addresses_none": [28, []],
    "punch": [29, PEER_B, [["192.0.2.1", 1, 2]] * 8, 60_000_000],
    "relay_ask": [30, PEER_B, RUN],
    "welcome": [32, 1, "0.1.0", RUN, 7, 5000, False, "192.0.2.1", True, b""],
    "welcome_signed": [32, 1, "0.1.0", RUN, 7, 5000, False, "192.0.2.1", True, SIGNED],
    "probe": [31, 1, 65_535],
    "probe_no_port": [31, 1, 0],
    "rejected": [33, "protocol 2"],
    "epoch_propose": [34, U64, epoch(2, b"E" * 16), [[0, 0, 4]]],
    "epoch_propose_shares": [34, 1, epoch(2, b"E" * 16, plan=plan(shares=(0, U32))), []],
    "epoch_propose_ring": [34, 1, epoch(2, b"E" * 16, plan=plan(ring=(1, 0), ring_from=0)), []],
    "epoch_propose_ring_from": [34, 1, epoch(2, b"E" * 16, plan=plan(ring_from=U64 - 1)), []],
    "epoch_propose_all_of_a_plan": [
        34, 1, epoch(2, b"E" * 16, plan=plan((3, 1), (1, 0), ring_from=1 << 20, pace=999_999)), [],
    ],
    "epoch_commit_by_majority": [35, epoch(2, b"E" * 16), "loss", [], "", 2, False, b""],
    "epoch_commit_signed": [35, epoch(1, peers="A"), "found", [], "", 1, True, SIGNED],
    "epoch_commit_found": [35, epoch(1, peers="A"), "found", [], "", 1, True, b""],
    "epoch_commit_loss": [35, epoch(2, b"E" * 16), "loss", [[0, 0, 4, 1], [0, 0, 5, 2]], "", 2, True, b""],
    "epoch_commit_mismatch": [35, epoch(2, b"E" * 16), "mismatch", [], "x" * 1000, 2, True, b""],
    "epoch_commit_verdict_of_a_pair": [35, epoch(2, b"E" * 16), "loss", [[2, PAIR_0_1, 4, 1]], "", 2, True, b""],
    "flush": [36, 1, 1, 2, [PEER_A, PEER_B]],
    "evicted": [37, "silent for 5.1 s"],
    "pending": [38, 2],
    "status": [39, "{}"],
    "cancelled": [40, 3],
    "alive": [41],
    "unknown": [42, RUN, True],
    "undecided": [43, U64, "1 of 2 members"],
    "peer_hello": [64, 1, RUN, PEER_A, INC_A, PEER_B, INC_B, 0, ZERO],
    "peer_hello_relayed": [64, 1, RUN, PEER_A, INC_A, PEER_B, INC_B, 3, RUN],
    "peer_welcome": [65, 1],
    "peer_refused": [66, "not of this run"],
    "observe": [20, 1, "0.1.0", U32, PEER_A, INC_A, ADDRESSES, True],
    "members": [44, U64, [MEMBER_A, MEMBER_B]],
    "members_nobody": [44, 0, []],
    "observers": [45, [MEMBER_A]],
    "observers_nobody": [45, []],
    "term": [46, U64, b""],
    "term_signed": [46, U64, SIGNED],
    "challenge": [47, 1, b"N" * 32],
    "invited": [48, b"I" * 8, b"T" * 256],
    "done": [49],
    "reflected": [50, "2001:db8::1", 65535],
    "moved": [51, MEMBER_A],
    "punch_ask": [52, PEER_A, 8],
    "punch_go": [53, PEER_A, [["192.0.2.1", 1, 2]], 20_000],
    "relay_call": [54, PEER_A, RUN],
    "relays": [55, [MEMBER_A, [ZERO, ZERO, [], ""]]],
    "relay_for": [56, MEMBER_A, MEMBER_B],
    "relay_over": [61, [PEER_A, PEER_B]],
    "pulse_keys": [60, b"K" * 32, b"L" * 32],
    "probed": [57, "192.0.2.7", 65_535, U64, True, "", []],
    "probed_in_vain": [57, "2001:db8::7", 1, 0, False, "x" * 200, []],
    "probed_by_members": [57, "192.0.2.7", 5, 6, True, "", [[PEER_A, ""], [PEER_B, "x" * 100], [PEER_A, "refused"]]],
    "sampled": [58, 4 << 20],
    "sampled_nothing": [58, 0],
    "dial_ask": [59, U64, "192.0.2.7", 65_535],
    "sample_upwards": [80, 1, True],
    "sample_downwards": [80, U32, False],
    "dialed": [81, U64, ""],
    "dialed_in_vain": [81, 0, "x" * 100],
    "state_hello": [67, 1, RUN, PEER_A, INC_A, PEER_B, INC_B, U64, U64],
    "state_offer": [68, 2**63 - 1, 2**63 - 1, b"l" * 32],
    "state_none": [69],
    "peer_offer": [71, b"X" * 32, 2],
    "peer_proof": [72, b"K" * 32, b"S" * 16, b"s" * 64],
    "relay_hello": [70, 1, RUN, PEER_A, INC_A, PEER_B, INC_B],
}

BAD: dict[str, object] = {
    "nil": None,
    "number": 3,
    "map": {0: 3},
    "empty_array": [],
    "unknown_type": [0],
    "type_between_the_tables": [63],
    "type_negative": [-1],
    "type_true_is_not_1": [True, 1, "0.1.0", 0, PEER_A, INC_A, [], None],
    "type_as_text": ["3"],
    "field_missing": [6],
    "field_additional": [3, None],
    "hello_peer_15_bytes": [1, 1, "0.1.0", 0, PEER_A[:15], INC_A, [], None],
    "hello_peer_as_text": [1, 1, "0.1.0", 0, "A" * 16, INC_A, [], None],
    "hello_library_33_characters": [1, 1, "x" * 33, 0, PEER_A, INC_A, [], None],
    "hello_version_negative": [1, -1, "0.1.0", 0, PEER_A, INC_A, [], None],
    "hello_version_too_large": [1, U32 + 1, "0.1.0", 0, PEER_A, INC_A, [], None],
    "hello_version_float": [1, 1.0, "0.1.0", 0, PEER_A, INC_A, [], None],
    "hello_port_0": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 0, 0]], None],
    "hello_port_65536": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 65536, 0]], None],
    "hello_host_256_characters": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h" * 256, 1, 0]], None],
    "hello_9_addresses": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 1, 0]] * 9, None],
    "hello_address_of_2": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 1]], None],
    "hello_address_kind_4": [1, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 1, 4]], None],
    "hello_resume_frozen_as_number": [1, 1, "0.1.0", 0, PEER_A, INC_A, [], [RUN, 3, b"E" * 16, 1, 7]],
    "hello_resume_false": [1, 1, "0.1.0", 0, PEER_A, INC_A, [], False],
    "arrive_space_3": [5, 1, [[3, 0, 3]]],
    "arrive_pair_without_ranks": [5, 1, [[2, 7, 3]]],
    "arrive_pair_of_one": [5, 1, [[2, 1 << 32 | 1 << 40, 3]]],
    "arrive_pair_out_of_order": [5, 1, [[2, 1 << 32, 3]]],
    "arrive_pair_beyond_48_bits": [5, 1, [[2, PAIR_0_1 | 1 << 48, 3]]],
    "arrive_collective_tag_beyond_32_bits": [5, 1, [[0, PAIR_0_1, 3]]],
    "report_pair_out_of_order": [12, 1, 1, [[2, 1 << 32, 0, 2, 0]]],
    "blocked_internal_tag_beyond_32_bits": [14, 1, [[1, U32 + 1, 0]], False, False],
    "epoch_commit_verdict_pair_of_one": [35, epoch(1, peers="A"), "loss", [[2, 0, 4, 1]], "", 1, True, b""],
    "recall_verdict_pair_of_one": [19, RUN, 7, epoch(2, b"E" * 16), "loss", [[2, 0, 4, 1]], "", 2, True, b"", b""],
    "arrive_counts_nil": [5, 1, None],
    "arrive_number_nil": [5, None, []],
    "unreachable_257_peers": [9, 2, 1, [PEER_B] * 257, ""],
    "unreachable_reason_201_characters": [9, 2, 1, [PEER_B], "x" * 201],
    "suspect_other_cause": [10, PEER_B, "ugly", ""],
    "report_state_0": [12, 1, 1, [[0, 0, 0, 0, 0]]],
    "report_state_5": [12, 1, 1, [[0, 0, 0, 5, 0]]],
    "blocked_1025_keys": [14, 1, [[0, 0, n] for n in range(1025)], True, False],
    "blocked_flag_as_number": [14, 1, [], 1, False],
    "differs_spec_39_bytes": [16, 1, [0, 0, 4], PEER_B, SPEC[:39], SPEC],
    "measured_move_too_fast": [21, 10**13 + 1, 0, 0, 0, []],
    "measured_fold_too_fast": [21, 0, 10**13 + 1, 0, 0, []],
    "measured_code_too_fast": [21, 0, 0, 10**13 + 1, 0, []],
    "measured_down_too_fast": [21, 0, 0, 0, 10**13 + 1, []],
    "measured_rate_as_float": [21, 0, 0, 0, 0, [[PEER_A, 1.0, 0, 0, 0, ZERO]]],
    "measured_rate_negative": [21, 0, 0, 0, 0, [[PEER_A, -1, 0, 0, 0, ZERO]]],
    "measured_crowd_too_fast": [21, 0, 0, 0, 0, [[PEER_A, 1, 10**13 + 1, 0, 0, ZERO]]],
    "measured_rtt_above_60_s": [21, 0, 0, 0, 0, [[PEER_A, 1, 1, 60_000_001, 0, ZERO]]],
    "measured_path_4": [21, 0, 0, 0, 0, [[PEER_A, 1, 1, 1, 4, ZERO]]],
    "measured_257_links": [21, 0, 0, 0, 0, [[PEER_A, 1, 1, 1, 0, ZERO]] * 257],
    "join_identity_31_bytes": [22, b"K" * 31, b"S" * 16, b"", b"s" * 64],
    "join_token_257_bytes": [22, b"K" * 32, b"S" * 16, b"T" * 257, b"s" * 64],
    "join_signature_63_bytes": [22, b"K" * 32, b"S" * 16, b"", b"s" * 63],
    "invite_ask_for_0_seconds": [23, 0, 0, None, ""],
    "invite_ask_for_more_than_366_days": [23, 366 * 86_400 + 1, 0, None, ""],
    "invite_ask_1025_uses": [23, 1, 1025, None, ""],
    "invite_ask_label_33_characters": [23, 1, 0, None, "x" * 33],
    "revoke_id_7_bytes": [24, b"I" * 7],
    "kick_id_as_text": [26, "B" * 16],
    "pulse_keys_of_31_bytes": [60, b"K" * 31, b"L" * 32],
    "probe_port_65536": [31, 1, 65_536],
    "probed_port_0": [57, "192.0.2.7", 0, 0, True, "", []],
    "probed_reason_201": [57, "192.0.2.7", 1, 0, False, "x" * 201, []],
    "probed_by_4_members": [57, "192.0.2.7", 1, 0, True, "", [[PEER_A, ""]] * 4],
    "probed_by_a_member_reason_101": [57, "192.0.2.7", 1, 0, True, "", [[PEER_A, "x" * 101]]],
    "probed_without_members": [57, "192.0.2.7", 1, 0, True, ""],
    "sampled_beyond_4_mib": [58, (4 << 20) + 1],
    "dial_ask_port_0": [59, 1, "192.0.2.7", 0],
    "dial_ask_host_256": [59, 1, "x" * 256, 1],
    "sample_direction_1": [80, 1, 1],
    "dialed_reason_101": [81, 1, "x" * 101],
    "dialed_ticket_negative": [81, -1, ""],
    "challenge_nonce_31_bytes": [47, 1, b"N" * 31],
    "welcome_peer_timeout_0": [32, 1, "0.1.0", RUN, 7, 0, False, "", False, b""],
    "epoch_commit_other_kind": [35, epoch(1, peers="A"), "coup", [], "", 1, True, b""],
    "epoch_commit_verdict_3": [35, epoch(1, peers="A"), "loss", [[0, 0, 4, 3]], "", 1, True, b""],
    "epoch_commit_detail_1001_characters": [35, epoch(1, peers="A"), "loss", [], "x" * 1001, 1, True, b""],
    "epoch_commit_journaled_1": [35, epoch(1, peers="A"), "found", [], "", 1, 1, b""],
    "epoch_commit_signature_65_bytes": [35, epoch(1, peers="A"), "found", [], "", 1, True, b"s" * 65],
    "recall_wrong_id": [19, RUN, 7, epoch(2, b"E" * 16, flip=1), "loss", [], "", 2, True, b"", b""],
    "epoch_commit_wrong_id": [35, epoch(1, peers="A", flip=1), "found", [], "", 1, True, b""],
    "epoch_commit_number_0": [35, epoch(0, peers="A"), "found", [], "", 1, True, b""],
    "epoch_commit_no_members": [35, epoch(1, peers=""), "found", [], "", 1, True, b""],
    "epoch_commit_members_out_of_order": [35, epoch(1, peers="BA"), "found", [], "", 1, True, b""],
    "epoch_commit_member_twice": [35, epoch(1, peers="AA"), "found", [], "", 1, True, b""],
    "epoch_plan_that_says_nothing": [34, 1, epoch(2, b"E" * 16, plan=plan()), []],
    "epoch_plan_of_5_bytes": [34, 1, epoch(2, b"E" * 16, plan=plan()[:5]), []],
    "epoch_plan_version_2": [34, 1, epoch(2, b"E" * 16, plan=plan((1, 1), version=2)), []],
    "epoch_plan_flags_4": [34, 1, epoch(2, b"E" * 16, plan=plan(flags=4, ring_from=1)), []],
    "epoch_plan_pace_of_direct": [34, 1, epoch(2, b"E" * 16, plan=plan(ring_from=1, pace=1_000_000)), []],
    "epoch_plan_for_3_members": [34, 1, epoch(2, b"E" * 16, plan=plan((1, 1, 1), members=3)), []],
    "epoch_plan_shares_missing": [34, 1, epoch(2, b"E" * 16, plan=plan(flags=1)), []],
    "epoch_plan_shares_too_many": [34, 1, epoch(2, b"E" * 16, plan=plan((1, 1, 1))), []],
    "epoch_plan_shares_all_zero": [34, 1, epoch(2, b"E" * 16, plan=plan((0, 0))), []],
    "epoch_plan_ring_rank_twice": [34, 1, epoch(2, b"E" * 16, plan=plan(ring=(1, 1))), []],
    "epoch_plan_ring_rank_beyond": [34, 1, epoch(2, b"E" * 16, plan=plan(ring=(0, 2))), []],
    "epoch_plan_and_more": [34, 1, epoch(2, b"E" * 16, plan=plan(ring=(1, 0)) + b"\0"), []],
    "epoch_plan_not_of_its_id": [34, 1, [*epoch(2, b"E" * 16)[:-1], plan(ring=(1, 0))], []],
    "flush_257_members": [36, 1, 1, 2, [PEER_A] * 257],
    "observe_9_addresses": [20, 1, "0.1.0", 0, PEER_A, INC_A, [["h", 1, 0]] * 9, False],
    "members_257": [44, 1, [MEMBER_A] * 257],
    "observers_9": [45, [MEMBER_A] * 9],
    "observers_member_of_3": [45, [[PEER_A, INC_A, []]]],
    "observers_seen_256_characters": [45, [[PEER_A, INC_A, [], "h" * 256]]],
    "term_negative": [46, -1, b""],
    "term_bool": [46, True, b""],
    "punch_9_endpoints": [29, PEER_B, [["192.0.2.1", 1, 2]] * 9, 1],
    "punch_rtt_above_60_s": [29, PEER_B, [], 60_000_001],
    "relay_ask_without_relay": [30, PEER_B],
    "reflected_port_0": [50, "192.0.2.1", 0],
    "moved_incarnation_15_bytes": [51, [PEER_A, INC_A[:15], [], ""]],
    "punch_ask_0": [52, PEER_A, 0],
    "punch_ask_9": [52, PEER_A, 9],
    "punch_go_9_endpoints": [53, PEER_A, [["192.0.2.1", 1, 2]] * 9, 1],
    "relay_over_257": [61, [PEER_A] * 257],
    "relays_17": [55, [MEMBER_A] * 17],
    "peer_hello_path_4": [64, 1, RUN, PEER_A, INC_A, PEER_B, INC_B, 4, ZERO],
    "state_hello_have_negative": [67, 1, RUN, PEER_A, INC_A, PEER_B, INC_B, -1, 0],
    "state_offer_revision_2_63": [68, 2**63, 1, b"l" * 32],
    "state_offer_size_2_63": [68, 1, 2**63, b"l" * 32],
    "state_offer_layout_31_bytes": [68, 1, 1, b"l" * 31],
    "peer_offer_key_31_bytes": [71, b"X" * 31, 1],
    "peer_offer_cipher_0": [71, b"X" * 32, 0],
    "peer_offer_cipher_3": [71, b"X" * 32, 3],
    "peer_proof_signature_65_bytes": [72, b"K" * 32, b"S" * 16, b"s" * 65],
    "relay_hello_without_incarnations": [70, 1, RUN, PEER_A, PEER_B],
    "relay_hello_run_15_bytes": [70, 1, RUN[:15], PEER_A, INC_A, PEER_B, INC_B],
}


def lines() -> Iterator[str]:
    for verdict, table in (("ok", GOOD), ("refused", BAD)):
        for name, body in table.items():
            yield f"{name} {verdict} {msgpack.packb(body, use_bin_type=True).hex()}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    args = parser.parse_args()
    text = "".join(lines())
    if not args.check:
        PATH.write_text(text, encoding="utf-8")
        return 0
    stale = not PATH.is_file() or PATH.read_text(encoding="utf-8") != text
    if stale:
        print(f"{PATH} is stale: run tools/make_message_vectors.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
