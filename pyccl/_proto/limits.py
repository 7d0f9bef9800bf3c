"""Every maximum of the control plane in one place: no length, count or queue that a stranger can grow is without one.

Numbers that stand in proto/wire.md are repeated here by name; the others bound what the machines remember.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1

# ---- proto/wire.md 2: envelopes
BODY_MAX_BYTES: Final = 4 << 20  # a commit with all verdicts, counts or reports that KEYS_MAX allows
BODY_GREETING_MAX_BYTES: Final = 4096  # before Welcome: a stranger may not make us hold more
BODY_NEWCOMER_MAX_BYTES: Final = 8192  # nor one that waits; its longest is an Unreachable that names everybody

# ---- proto/wire.md 4: fields
ID_BYTES: Final = 16
SPEC_BYTES: Final = 40
U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1
SPACE_MAX: Final = 2
LIBRARY_CHARS_MAX: Final = 32
HOST_CHARS_MAX: Final = 255
PORT_MAX: Final = 65_535
ADDRESSES_MAX: Final = 8
PUNCHES_MAX: Final = 8  # connections of one attempt
RELAYS_MAX: Final = 16  # that offer to be one, and are no members
MEMBERS_MAX: Final = 256
PLAN_BYTES_MAX: Final = 65_536
KEYS_MAX: Final = 65_536  # counts, operations and verdicts of one message
LACKING_MAX: Final = 1024
REASON_CHARS_MAX: Final = 200
ARRAYS_MAX: Final = KEYS_MAX + MEMBERS_MAX * (ADDRESSES_MAX + 2) + 16  # of one message, one in another counted too
DETAIL_CHARS_MAX: Final = 1000
STATUS_CHARS_MAX: Final = 1 << 20
PEER_TIMEOUT_MS_MAX: Final = U32_MAX
HASH_BYTES: Final = 32
CONNECTIONS_MAX: Final = 64  # of one pair
PLAN_PIECE_MIN: Final = 1 << 14  # bytes of the pieces that a plan may ask for: powers of two
PLAN_PIECE_MAX: Final = 1 << 17
RATE_MAX: Final = 10**13  # bytes per second that a member tells of
RTT_US_MAX: Final = 60_000_000
STATE_BYTES_MAX: Final = (1 << 63) - 1  # of a state file; a revision has the same limit
DIALERS_MAX: Final = 3  # members that dial back for one Probe
DIAL_REASON_CHARS_MAX: Final = 100  # so that a Probed with all of them fits a greeting
SAMPLE_BYTES: Final = 4 << 20  # of one direction
SAMPLE_CHUNK_BYTES: Final = 16 << 10
SAMPLE_BYTES_PER_S: Final = 8 << 20  # a master does not go faster

KEY_BYTES: Final = 32  # of an Ed25519 public key; also of a challenge
SIGNATURE_BYTES: Final = 64
INVITE_ID_BYTES: Final = 8
TOKEN_BYTES_MAX: Final = 256
LABEL_CHARS_MAX: Final = 32
INVITE_S_MAX: Final = 366 * 86_400
USES_MAX: Final = 1024  # of one invite; more than that many identities: any number

CONTROLS_OF_IDENTITY_MAX: Final = 256  # to a secure master: control connections of peers and observers
OTHERS_OF_IDENTITY_MAX: Final = 512  # neither control nor pulse connections, of which each peer has one
CONNECTIONS_OF_IDENTITY_MAX: Final = 1024  # all, those included that are being replaced
REFLECTIONS_MAX: Final = 64  # held open by one peer: its own, and those of attempts to punch, with several at a time

# ---- what the master remembers
USED_MAX: Final = 4096  # identities that came in with invites for so many, all invites together
REVOKED_MAX: Final = 4096
BANNED_MAX: Final = 4096  # identities that were kicked
CAME_MAX: Final = 4096  # peers of which it is known whose they are; who is in goes last
GROUPS_MAX: Final = 4096
PENDING_MAX: Final = 1024  # newcomers that wait, all groups together
GONE_MAX: Final = 4096  # incarnations whose eviction reason is kept
EVENTS_MAX: Final = 50
OBSERVERS_MAX: Final = 8  # of one group
OBSERVERS_OF_ALL_MAX: Final = 256

# ---- what is done for those who only ask
DIAL_BACKS_BURST: Final = 4  # of all Probes together, then one every so often
DIALS_BURST: Final = 2 * DIAL_BACKS_BURST  # of a member: more than a master asks for, also one that starts anew
SAMPLES_BURST: Final = 6
SAMPLES_WAITING_MAX: Final = 8  # while one is taken

# ---- times, seconds
GREETING_S: Final = 10.0  # from a connection to its Hello
LINE_GAP_TIMEOUTS: Final = 0.5  # nobody at all heard for so many peer_timeouts: it may be the master's own line
RECONNECT_S: Final = 5.0  # in which every member has tried again to reach a master that has come back
MISSED_S: Final = 0.5  # of these for whom other members miss as well: its silence costs peer_timeout + 1 s
PAUSE_S: Final = 1.0  # a longer gap between ticks means that we ourselves were stopped
HEARTBEATS_PER_TIMEOUT: Final = 5
HANG_UP_TIMEOUTS: Final = 0.6  # of peer_timeout without an acknowledgement of the master's host: a peer dials it anew
LONE_SAFE_POINT_S: Final = 0.1  # a lone member's safe point that changes nothing takes this long
PUNCH_S: Final = 10.0  # so long an offer to punch waits for the other's
PUNCH_MARGIN_S: Final = 0.02  # in which both have surely heard when to begin
STUCK_S: Final = 60.0  # heard (its C threads live) but no answer to a flush, or to a proposal as a newcomer
TOTAL_LOSS_S: Final = 30.0  # no member heard or connected while a newcomer waits: the group starts anew
DIAL_BACK_S: Final = 3.0  # of one attempt
DIAL_TOLD_S: Final = DIAL_BACK_S + 1.0  # until members have said how it went
DIAL_BACK_EVERY_S: Final = 10.0
DIAL_EVERY_S: Final = DIAL_BACK_EVERY_S / 2  # of a member
SAMPLE_S: Final = 2.0  # that who asks takes
SAMPLE_HELD_S: Final = SAMPLE_S + 1.0  # that a master takes part at most
SAMPLE_EVERY_S: Final = 30.0
