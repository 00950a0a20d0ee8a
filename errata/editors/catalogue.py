"""The editors a stream can choose. A new one is a line here, a folder beside `d4s`, and a row in tests/contract/test_editors.py."""

from typing import Any

from errata.editors.base import Editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.errors import UnknownNameError
from errata.modeling.layout import ModelLayout
from errata.profiles import Profile

EDITORS = {"d4s": D4S}


def make_editor(name: str, profile: Profile, moments: Moments, layout: ModelLayout, **limits: Any) -> Editor[Any]:
    """An editor for one base and profile.

    Args:
        limits: what it may use of this machine, under the names that the editor has for it; results depend on it by rounding at most.

    Raises:
        UnknownNameError: no editor of that name.
        BaseMismatchError, EditorError: profile and moments do not fit together.
    """
    if name not in EDITORS:
        raise UnknownNameError(f"editor: expected one of {', '.join(EDITORS)}, found {name!r}")
    return EDITORS[name](profile, moments, layout, **limits)
