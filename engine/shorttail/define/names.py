"""The rules for names and references in definitions and requests. docs/names.md gives them to users.

A name is printable text in Unicode's form NFC: equal names have equal bytes, and a name fits into a line of a log. The
names of views and models are also those of folders, so their characters are fewer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from shorttail.config import LIMITS
from shorttail.define.refusal import short_repr
from shorttail.errors import InvalidArgument

REQUEST: Final = "request"  # the first part of "request:column"
# Characters that Unicode counts as letters or marks, and that are not seen: fillers of Hangul and Khmer, variation
# selectors, the grapheme joiner (those of Default_Ignorable_Code_Point that str.isprintable accepts).
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def check_name(name: object, what: str) -> str:
    """Return the name of an entity, a feature or a column if it is valid. Raises InvalidArgument.

    what: the beginning of the message.
    """
    return _checked(name, what, _fault)


def check_path_name(name: object, what: str) -> str:
    """Return the name of a view, an alias or a model if it is valid. Raises InvalidArgument.

    It is safe as the name of a folder; an alias is no folder, but shares its name space with the views.

    what: the beginning of the message.
    """
    return _checked(name, what, _path_fault)


def check_function_name(name: object, what: str) -> str:
    """Return the name of an on-demand function if it is valid: a Python identifier. Raises InvalidArgument.

    what: the beginning of the message.
    """
    if isinstance(name, str) and not name.isidentifier():
        raise InvalidArgument(f"{what} {quoted(name)} is not a Python identifier; use `def name(...)`")
    return check_name(name, what)


def check_text(value: object, what: str) -> None:
    """Raise InvalidArgument unless `value` is a string."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be a string, not {short_repr(value)}")


def check_tags(tags: object, what: str) -> tuple[str, ...]:
    """Return tags as a tuple if they are a list of different names. Raises InvalidArgument.

    what: the beginning of the message.
    """
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise InvalidArgument(f"{what}: tags must be a list of names, not {short_repr(tags)}")
    found = dict.fromkeys(check_name(tag, f"{what}: tag") for tag in tags)
    if len(found) < len(tags):
        raise InvalidArgument(f"{what}: a tag is given twice: {', '.join(map(str, tags))}")
    return tuple(found)


def _checked(name: object, what: str, fault_of: Callable[[str], str]) -> str:
    if not isinstance(name, str):
        raise InvalidArgument(f"{what} {quoted(name)}: a name is a string")
    if fault := fault_of(name):
        raise InvalidArgument(f"{what} {quoted(name)}: {fault}")
    return name


def _fault(name: str) -> str:
    """Return what is wrong with the name of an entity, a feature or a column, "" if nothing is."""
    if not name:
        return "a name has at least one character"
    if len(name) > LIMITS.name_bytes:
        return f"a name has at most {LIMITS.name_bytes} bytes of UTF-8, not {len(name)} characters"
    if name != name.strip():
        return "a name has no white space at its ends"
    if not name.isprintable():
        bad = next(character for character in name if not character.isprintable())
        return f"a name has printable characters only; U+{ord(bad):04X} is none"
    if ":" in name or "/" in name:
        return "a name has no : and no /, because they separate names in references and paths"
    if not unicodedata.is_normalized("NFC", name):
        composed = unicodedata.normalize("NFC", name)
        return f"a name is in Unicode's composed form (NFC); write {composed!a}, not {name!a}"
    if (size := len(name.encode())) > LIMITS.name_bytes:
        return f"a name has at most {LIMITS.name_bytes} bytes of UTF-8, not {size}"
    return ""


def _path_fault(name: str) -> str:
    """Return what is wrong with the name of a view, an alias or a model, "" if nothing is."""
    if fault := _fault(name):
        return fault
    # Python's identifiers are those of Unicode: letters, marks and digits of any script, and _.
    if not f"_{re.sub('[.-]', '_', name)}".isidentifier() or UNSEEN.search(name):
        return "the name of a view, an alias or a model has letters and digits of any script, _, - and . only"
    if not (name[0].isalnum() or name[0] == "_") or name[-1] == ".":
        return "the name of a view, an alias or a model begins with a letter, a digit or _, and does not end with a ."
    return ""


def split_reference(reference: object) -> tuple[str, str]:
    """Split "stats:age" into ("stats", "age"), and "buyer:stats:age" into ("buyer:stats", "age").

    The first part is the name of a lookup: a view, or an alias and a view. Raises InvalidArgument unless all parts are
    valid names.
    """
    parts = reference.split(":", 3) if isinstance(reference, str) else []
    fault = ""
    if len(parts) > 1:
        *lookup, feature = parts if len(parts) < 4 else parts[:2]
        fault = next(filter(None, (*map(_path_fault, lookup), _fault(feature))), "")
        if len(parts) > 3:
            fault = fault or "it has more than three parts"
        elif len(parts) == 3 and REQUEST in lookup:
            fault = fault or "columns of the request have no alias"
        if not fault:
            return ":".join(lookup), feature
    why = f" ({fault})" if fault else ""
    raise InvalidArgument(
        f"{quoted(reference)} is not a feature reference{why}; write 'view:feature' or 'request:column'"
    )


def lookup_of(reference: str) -> str:
    """Return the name of the lookup in a valid reference: "stats" or "buyer:stats"; "request" for a request column."""
    return reference.rpartition(":")[0]


def plain_name(reference: str) -> str:
    """Return the last part of a valid reference: the name of a feature or a request column."""
    return reference.rpartition(":")[2]


def listed_lookups(views: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the lookups that there are: {"view" or "alias:view": {request column of a key: name of its type}}.

    views: as `Engine.views` lists them.
    """
    found = {}
    for view in views:
        found[view["name"]] = dict(view["keys"])
        for alias, columns in view.get("aliases", {}).items():  # older servers have none
            found[f"{alias}:{view['name']}"] = {columns[key]: dtype for key, dtype in view["keys"].items()}
    return found


def check_not_request(name: str, where: str) -> None:
    """Raise InvalidArgument for a view or an alias that has the name by which references have request columns."""
    if name == REQUEST:
        raise InvalidArgument(f"{where}: the name 'request' is reserved for request columns; choose another name")


def quoted(name: object) -> str:
    """Return a name that is not known to be valid for a message: in quotes, and cut if it is longer than a name is."""
    if not isinstance(name, str):
        return short_repr(name)
    return repr(name) if len(name) <= LIMITS.name_bytes else f"{name[:60]!r}... ({len(name)} characters)"


def decomposed(name: object, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name that is known in Unicode's composed form, else ""."""
    if not isinstance(name, str) or len(name) > LIMITS.name_bytes:
        return ""
    composed = unicodedata.normalize("NFC", name)
    if composed == name or composed not in known:
        return ""
    return f"; write it in Unicode's composed form (NFC): {composed!a}, not {name!a}"


def suggestion(name: object, known: Iterable[str], what: str) -> str:
    """Return the end of a message about an unknown name: "; did you mean 'x'?" or "; views: a, b, c"."""
    names = list(known)
    if not names:
        return f"; there are no {what} yet"
    # A server calls this for strangers. The time grows with the product of the lengths, so the product is bounded.
    if isinstance(name, str) and len(name) * sum(map(len, names)) <= LIMITS.suggestion_steps:
        if hint := decomposed(name, names):
            return hint
        if close := get_close_matches(name, names, n=1):
            return f"; did you mean '{close[0]}'?"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; {what}: {shown}"
