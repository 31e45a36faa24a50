"""The one error root. An error says what is wrong (message) and what to do next (hint); its class fixes the exit code."""

from __future__ import annotations


class GkpError(Exception):
    """Root of every error gkp raises on purpose.

    message: one line, what is wrong. hint: one line, what to do about it ("" when there is nothing to do).
    exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class VerificationError(GkpError):
    """Two models that must compute the same do not."""

    exit_code = 1


class UsageError(GkpError):
    """The request cannot be met: shape, batch, option, a precision the target cannot give."""

    exit_code = 2


class UnsupportedModelError(GkpError):
    """The model holds something gkp cannot convert: operators, NaN weights, an unknown architecture."""

    exit_code = 3


class BackendMissingError(GkpError):
    """A library or device that the request needs is not here."""

    exit_code = 4


class UnsafeFileError(GkpError):
    """The file wants to run code, leave its folder, or take more memory than it may."""

    exit_code = 5


class FileError(GkpError):
    """A file is missing, corrupt, or cannot be read or written."""

    exit_code = 6
