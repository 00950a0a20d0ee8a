"""Pydantic's findings in our own words: which field, what was expected, what was found. Never a traceback, never a whole value."""

import difflib
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

SHOWN = 60
"""Most characters of a found value that a message repeats."""

_SAYS_FIELD = re.compile(r"^([A-Za-z_][\w.\[\]]*): (.+)$", re.DOTALL)
_EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "datetime_from_date_parsing": "a time such as 2026-01-31T12:00:00Z",
    "datetime_parsing": "a time such as 2026-01-31T12:00:00Z",
    "datetime_type": "a time such as 2026-01-31T12:00:00Z",
    "dict_type": "an object",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "model_type": "an object",
    "string_type": "text",
    "string_unicode": "Unicode text",
    "timezone_aware": "a time with its zone, such as 2026-01-31T12:00:00Z",
    "tuple_type": "a list",
}


class Problem(NamedTuple):
    field: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" if self.field else self.reason


def show_value(value: Any) -> str:
    """A found value, short enough for a message: text by its beginning and length, containers by kind and size."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if len(value) > SHOWN:
            return f"{value[:SHOWN]!r}… ({len(value)} characters)"
        case dict():
            return f"an object with {show_names(value)}" if value else "an empty object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            shown = repr(value)
            return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def show_names(names: Collection[Any], most: int = 6) -> str:
    """The first few names of a record, quoted."""
    shown = [repr(str(name)[:SHOWN]) for name in list(names)[:most]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def explain_unknown(name: str, known: Collection[str], noun: str) -> str:
    """What to say about a name that nothing has: the nearest known one where there is a near one, else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    expected = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"
    return f"unknown {noun} {name[:SHOWN]!r}; {expected}"


def explain_errors(error: ValidationError, known: Collection[str] = (), noun: str = "field") -> list[Problem]:
    """Every finding as one sentence. Unknown names come first: a misspelt name is usually the cause of the missing one.

    Args:
        error: what pydantic raised.
        known: names to suggest for an unknown one, nested ones as `section.name`.
        noun: what a name is called: field, setting.
    """
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    return [_explain(detail, known, noun) for detail in details]


def _explain(detail: ErrorDetails, known: Collection[str], noun: str) -> Problem:
    loc = detail["loc"]
    field = spell_path(loc) or None
    found = show_value(detail["input"])
    match detail["type"]:
        case "missing":
            return Problem(field, "expected a value, found none")
        case "extra_forbidden":
            beside = [name for name in known if name.count(".") == len(loc) - 1]
            return Problem(field, explain_unknown(spell_path(loc), beside, noun) if beside else f"unknown {noun} {str(loc[-1])[:SHOWN]!r}")
        case "value_error":
            said = str(detail["ctx"]["error"])
            named = None if field else _SAYS_FIELD.match(said)
            return Problem(named[1], named[2]) if named else Problem(field, said)
        case "string_pattern_mismatch":
            return Problem(field, f"expected text that matches {detail['ctx']['pattern']}, found {found}")
        case kind if kind in _EXPECTED:
            return Problem(field, f"expected {_EXPECTED[kind]}, found {found}")
        case _:
            said = re.sub(r"^\w+ should (?:be|have) (?=(greater|less)?)", lambda m: f"expected {'a value ' if m[1] else ''}", detail["msg"])
            return Problem(field, f"{said}, found {found}")


def spell_path(loc: tuple[int | str, ...]) -> str:
    """`('neighborhood_prompts', 3, 'prompt')` as `neighborhood_prompts[3].prompt`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)[:SHOWN]
    return path
