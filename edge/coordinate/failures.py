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
    """What an error means for the next step: (the error for the user, what to do about it)."""

    # the connection to the worker itself, or the worker is leaving
    LOST = DeviceLostError, "start its worker again, or name plans for fewer devices under fallback in the cluster file"
    # a worker could not reach another
    PEER = DeviceLostError, "let the devices reach each other's ports: the addresses are the plan's, or gkp serve --peer"
    # a queue is full: wait a little
    BUSY = DeadlineError, "send fewer requests at once, or allow more time"
    CORRUPT = CorruptDataError, "look for broken memory or network hardware on the way to that device"
    DEADLINE = DeadlineError, "allow more time, or see what keeps the device busy"
    REFUSED = RefusedError, "run gkp edge keys with all the plans again, and copy each device's folder and keys to it"
    # the same would happen again
    FAILED = ComputeError, "gkp run --local tells whether it is the model or that device"


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


def typed(error: RemoteError) -> ClusterError:
    """The error for the user."""
    kind, hint = verdict(error).value
    if error.error == "not-finite":
        hint = "an input far out of range does that; so does float16 between devices, above 65504: gkp split --wire float32"
    made: ClusterError = kind(error.message, error.hint or hint)
    return made
