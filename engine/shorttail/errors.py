"""Errors with the code that travels on the wire (the gRPC canonical names)."""

from __future__ import annotations


class ShorttailError(Exception):
    """Base of every error this package raises on purpose.

    The message is one line: what is wrong, with the name the user gave, and what to do about it. A name may hold
    anything; what would break the line, or mean something to a terminal, is shown escaped.
    """

    code = "INTERNAL"

    def __init__(self, message: str = ""):
        if not message.isprintable():
            message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(message)

    @property
    def message(self) -> str:
        return str(self) or self.code


class InvalidArgument(ShorttailError):
    """The request, definition or file is wrong in itself; sending it again cannot help."""

    code = "INVALID_ARGUMENT"


class NotFound(ShorttailError):
    """A model, view, feature, version, store or file of that name does not exist."""

    code = "NOT_FOUND"


class DeadlineExceeded(ShorttailError):
    """The answer could not be given in the time the caller allowed."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(ShorttailError):
    """A limit was reached: size of a request, queue, disk or map."""

    code = "RESOURCE_EXHAUSTED"


class Unauthenticated(ShorttailError):
    """The server wants a token first."""

    code = "UNAUTHENTICATED"


class PermissionDenied(ShorttailError):
    """The token does not allow this."""

    code = "PERMISSION_DENIED"


class Unavailable(ShorttailError):
    """The server is not there, stopping, or not ready; trying again may help."""

    code = "UNAVAILABLE"


class Internal(ShorttailError):
    """A fault of the engine or of a model while it ran."""

    code = "INTERNAL"


BY_CODE: dict[str, type[ShorttailError]] = {cls.code: cls for cls in ShorttailError.__subclasses__()}


def from_code(code: str, message: str) -> ShorttailError:
    """The error that a server reported, as the exception a caller can catch."""
    return BY_CODE.get(code, Internal)(message)
