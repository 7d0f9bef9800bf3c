"""Every exception of pyccl. Each class answers: whose fault is it, may I retry, what is in my array now.

Unless a class says otherwise, after an error from a collective the input holds what the caller put there and ``out``
(where it is another array) is undefined.  Imports nothing, so that each room of the package may import it.
"""

from __future__ import annotations

__all__ = [
    "AloneError",
    "DeadlineError",
    "EvictedError",
    "MasterUnavailableError",
    "MismatchError",
    "OutcomeUnknownError",
    "PeerLostError",
    "PoisonError",
    "PycclError",
    "RejectedError",
    "RemoteProtocolError",
    "StagingError",
    "StateFileError",
    "UsageError",
]


class PycclError(Exception):
    """Base of all errors of this package: catch this one to catch them all."""


class PeerLostError(PycclError):
    """A participant gave the operation up, or was lost and it was not to be retried (``retry=False``; root or partner).

    Fault: the lost peer's, or the network's.  Retry: yes, at once; the next epoch is without that peer.
    Array: the input is restored on every survivor, none of them has the result.
    """

    def __init__(self, message: str, peer: str | None = None) -> None:
        super().__init__(message)
        self.peer = peer  # 32 hex characters, None where no single peer is to blame


class AloneError(PycclError):
    """Nobody else is left in the group, so there is nothing to reduce with.

    Fault: nobody's here.  Retry: after ``update_topology()`` has let somebody in.  Array: the input is restored.
    """


class DeadlineError(PycclError):
    """The time given to the call ran out, here or at another participant, or a started operation stopped moving.

    Fault: a straggler or a link, seldom this process.  Retry: yes; all participants fail the same operation, so a
    retry pairs up again if all of them retry.  Array: the input is restored everywhere.
    """


class MismatchError(PycclError):
    """The members called different things: other shapes, dtypes or tags, or one reduces while another is elsewhere.

    Fault: the programs'.  Retry: only after all members are brought back to a common point; every open call on every
    member ended with this error and the numbers of all tags start again at 0.  Array: the input is restored.
    ``peers`` are those named (32 hex characters, or as much as is known), ``fields`` what differs ("count", "dtype").
    """

    def __init__(self, message: str, peers: tuple[str, ...] = (), fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.peers = peers
        self.fields = fields


class PoisonError(PycclError):
    """The guard of the call refuses what a member contributed: not finite, or beyond a limit. All members raise this.

    ``peer`` (32 hex characters) is the first in rank order who contributed it, by its own word or that of those who
    received it; or the one whose share of the result came out wrong. None: nobody is to be named, as where finite
    contributions add up to infinity.
    Fault: that peer's data, a broken machine, or malice.  Retry: not with the same values.  Array: the input is
    restored.
    """

    def __init__(self, message: str, peer: str | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class EvictedError(PycclError):
    """The master took this peer out of the run: it was silent, unreachable, or cut off from another member.

    Fault: usually the network's.  Retry: not in this membership; ``connect()`` again comes back as a newcomer, then
    synchronise the shared state.  Array: the input is restored; the others may have gone on without it.
    """


class OutcomeUnknownError(PycclError):
    """This peer held the whole result but could not learn whether the others committed it, and so it left the run.

    Fault: the network's.  Retry: never the operation itself; ``connect()``, then synchronise the shared state, which
    tells what the others went on with.  Array: the input is restored, though others may hold the result.
    """


class MasterUnavailableError(PycclError):
    """The master can't be reached, or may not decide, and this call needs it: a safe point, or an operation of which a
    participant is lost.

    Fault: the master's, or the network's.  Retry: yes; collectives go on without it.  Array: the input is restored.
    """


class RejectedError(PycclError):
    """The master refused this peer; the text is the reason it gave (version, run, unreachable address...).

    Fault: configuration or reachability, see the reason.  Retry: only once the reason is gone.  Array: untouched.
    """


class RemoteProtocolError(PycclError):
    """What arrived breaks proto/wire.md.

    Fault: the sender's: another version, a bug, or malice.  Retry: not with that sender; its connection is closed.
    Array: untouched; nothing of a refused message is applied.
    """


class StagingError(PycclError):
    """This peer has no room for the shared state it fetches: the directory that the text names is full or not writable.

    Fault: this machine's.  Retry: after ``TMPDIR`` names another directory, or room was made.  Array: untouched, on all
    members; the others get PeerLostError.  (If what was staged could not be read again after the members had committed:
    this peer has left the run, and its arrays are whole only after ``connect()`` and another sync.)
    """


class StateFileError(PycclError):
    """A file is no whole state: torn, truncated, altered, of another program or another layout. The text says which.

    Fault: the disk's, or of who wrote it.  Retry: with another copy.  Array: untouched, unless the text says otherwise.
    """


class UsageError(PycclError, ValueError):
    """The call itself is wrong: an unsupported dtype, overlapping arrays, a closed communicator.

    Fault: the caller's.  Retry: after mending the call; nothing was sent.  Array: untouched.
    """
