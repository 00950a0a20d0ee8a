"""One JSON value to one edit, or to the reason why not."""

import re
from typing import Any

from pydantic import ValidationError

from errata.edits import Edit, Refusal, Submission
from errata.errors import RecordError
from errata.readers.forms import ENVELOPE, OWN, OWN_FIELDS, recognise
from errata.validation import explain_errors, show_value

_FIRST_NAME = re.compile(r"^\w+")


def read_record(value: Any, origin: str) -> Submission | Refusal:
    """Translate and validate one record; a bad one costs nothing but itself.

    Args:
        value: what `json` decoded.
        origin: `file:line` or `file[index]`. A row of our own form that carries its own origin keeps that one: it was written
            by `errata submit` from another file.
    """
    try:
        return _read(value, origin)
    except RecordError as error:
        return Refusal(origin=origin, field=error.field, reason=error.reason)


def _read(value: Any, origin: str) -> Submission:
    if not isinstance(value, dict):
        raise RecordError(f"expected an object with the fields of an edit, found {show_value(value)}")
    form = recognise(value)
    try:
        edit = Edit.model_validate(form.read(value))
        envelope = {name: value[name] for name in ENVELOPE & value.keys()} if form is OWN else {}
        return Submission.model_validate({"origin": origin, **envelope, "edit": edit})
    except ValidationError as error:
        field, reason = explain_errors(error, OWN_FIELDS)[0]
        raise RecordError(reason, field=_FIRST_NAME.sub(lambda name: form.spelling.get(name[0], name[0]), field or "") or None) from None
