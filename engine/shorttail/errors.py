"""The exceptions of this package. Each has the error code that is sent on the wire: a gRPC canonical name."""

from __future__ import annotations

MESSAGE_CHARS = 8192  # a longer message is cut: it may hold a name or a list of columns of any length


def printable(text: str) -> str:
    """Return the text with every character escaped that is not printable: line breaks, terminal control codes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ShorttailError(Exception):
    """The base class of every error that this package raises on purpose.

    The message is one line: what is wrong, with the name that the user gave, and what to do about it. It is cut after
    MESSAGE_CHARS characters. Names may hold any character, so those that are not printable are escaped.
    """

    code = "INTERNAL"

    def __init__(self, message: str = ""):
        if len(message) > MESSAGE_CHARS:
            message = f"{message[:MESSAGE_CHARS]} ..."
        super().__init__(printable(message))

    @property
    def message(self) -> str:
        return str(self) or self.code


class InvalidArgument(ShorttailError):
    """The request, definition or file itself is wrong. A retry cannot help."""

    code = "INVALID_ARGUMENT"


class NotFound(ShorttailError):
    """No model, view, feature, version, store or file has that name."""

    code = "NOT_FOUND"


class DeadlineExceeded(ShorttailError):
    """There was no answer within the time that the caller allowed."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(ShorttailError):
    """A limit was reached: the size of a request, a queue, the disk or the store's map."""

    code = "RESOURCE_EXHAUSTED"


class Unauthenticated(ShorttailError):
    """The server requires a token."""

    code = "UNAUTHENTICATED"


class PermissionDenied(ShorttailError):
    """The token, or the file system, does not allow the operation."""

    code = "PERMISSION_DENIED"


class Unavailable(ShorttailError):
    """The server is not running, is stopping or is not ready. A retry may help."""

    code = "UNAVAILABLE"


class Internal(ShorttailError):
    """The engine failed, a model failed while it ran, or a store is damaged."""

    code = "INTERNAL"


BY_CODE: dict[str, type[ShorttailError]] = {cls.code: cls for cls in ShorttailError.__subclasses__()}


def from_code(code: str, message: str) -> ShorttailError:
    """Return the exception for an error that a server reported. An unknown code gives Internal."""
    return BY_CODE.get(code, Internal)(message)
