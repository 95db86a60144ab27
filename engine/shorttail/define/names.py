"""The rules for names and references in definitions and requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from shorttail.errors import InvalidArgument

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def check_name(name: object, what: str) -> str:
    """Return the name if it is valid. Names become paths, keys and references, so other characters are refused.

    what: the beginning of the message. Raises InvalidArgument.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{what} {name!r}: a name is a letter or _ followed by up to 63 letters, digits or _ (no spaces, - or .)"
        )
    return name


def check_text(value: object, what: str) -> None:
    """Raise InvalidArgument unless `value` is a string."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be a string, not {value!r}")


def split_reference(reference: object) -> tuple[str, str]:
    """Split "user_stats:age" into ("user_stats", "age"). Raises InvalidArgument unless both parts are valid names."""
    if isinstance(reference, str):
        view, colon, feature = reference.partition(":")
        if colon and NAME.fullmatch(view) and NAME.fullmatch(feature):
            return view, feature
    raise InvalidArgument(f"{reference!r} is not a feature reference; write 'view:feature' or 'request:column'")


def suggestion(name: str, known: Iterable[str], what: str) -> str:
    """Return the end of a message about an unknown name: "; did you mean 'x'?" or "; views: a, b, c"."""
    names = list(known)
    if close := get_close_matches(name, names, n=1):
        return f"; did you mean '{close[0]}'?"
    if not names:
        return f"; there are no {what} yet"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; {what}: {shown}"
