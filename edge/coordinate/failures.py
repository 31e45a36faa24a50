"""What can go wrong with a request, as seen by the coordinator, and what it then does about it."""

from __future__ import annotations

from enum import Enum

from gkp.edge.wire.client import RemoteError
from gkp.errors import GkpError


class ClusterError(GkpError):
    """Root of what `Cluster.run` raises when it has no right answer. It never returns a wrong or partial one."""

    exit_code = 4


class DeviceLostError(ClusterError):
    """Devices that the request needs do not answer, and nothing else can compute it."""


class DeadlineError(ClusterError):
    """The answer was not there at the deadline."""


class CorruptDataError(ClusterError):
    """A checksum was wrong, and again when the request was repeated."""

    exit_code = 6


class RefusedError(ClusterError):
    """A worker serves another plan, or the certificates do not allow the request: nothing was computed."""

    exit_code = 2


class ComputeError(ClusterError):
    """A segment could not be computed, or gave NaN or infinity."""

    exit_code = 3


class Verdict(Enum):
    """What an error means for the next step."""

    LOST = "lost"  # the connection to the worker itself, or the worker is leaving
    PEER = "peer"  # a worker could not reach another
    BUSY = "busy"  # a queue is full: wait a little
    CORRUPT = "corrupt"
    DEADLINE = "deadline"
    REFUSED = "refused"
    FAILED = "failed"  # the same would happen again


def verdict(error: RemoteError) -> Verdict:
    """What an error means, by its status and the worker's own word. A status without such a word is the connection's."""
    status, said = error.status, error.error
    if status == "UNAVAILABLE":
        return Verdict.PEER if said == "peer" else Verdict.LOST
    if status == "RESOURCE_EXHAUSTED":
        return Verdict.FAILED if "larger than max" in error.message.lower() else Verdict.BUSY
    if status in ("ABORTED", "CANCELLED") or (status in ("INTERNAL", "UNKNOWN") and not said):
        return Verdict.LOST  # nobody but the transport, or a worker that stops, does that to a request of ours
    return {"DATA_LOSS": Verdict.CORRUPT, "ALREADY_EXISTS": Verdict.CORRUPT,  # a repeated request has another attempt
            "DEADLINE_EXCEEDED": Verdict.DEADLINE, "NOT_FOUND": Verdict.REFUSED, "PERMISSION_DENIED": Verdict.REFUSED,
            "UNAUTHENTICATED": Verdict.REFUSED}.get(status, Verdict.FAILED)


_HINTS = {
    Verdict.LOST: "start its worker again, or name plans for fewer devices under fallback in the cluster file",
    Verdict.PEER: "let the devices reach each other's ports: the addresses are the plan's, or gkp serve --peer",
    Verdict.BUSY: "send fewer requests at once, or allow more time",
    Verdict.CORRUPT: "look for broken memory or network hardware on the way to that device",
    Verdict.DEADLINE: "allow more time, or see what keeps the device busy",
    Verdict.REFUSED: "run gkp edge keys with all the plans again, and copy each device's folder and keys to it",
    Verdict.FAILED: "gkp run --local tells whether it is the model or that device"}


def typed(error: RemoteError) -> ClusterError:
    """The error for the user."""
    kinds = {Verdict.LOST: DeviceLostError, Verdict.PEER: DeviceLostError, Verdict.BUSY: DeadlineError,
             Verdict.CORRUPT: CorruptDataError, Verdict.DEADLINE: DeadlineError, Verdict.REFUSED: RefusedError,
             Verdict.FAILED: ComputeError}
    what = verdict(error)
    finite = "an input far out of range does that; so does float16 between devices, above 65504: gkp split --wire float32"
    hint = finite if error.error == "not-finite" else _HINTS[what]
    return kinds[what](error.message, error.hint or hint)
