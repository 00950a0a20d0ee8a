"""The editors a stream can choose. A new one is a line here, a folder beside `d4s`, and a row in tests/contract/test_editors.py."""

from typing import Any

from errata.editors.base import Editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.ireva.editor import IReVa
from errata.errors import EditorError, UnknownNameError
from errata.modeling.layout import ModelLayout
from errata.profiles import AnyProfile, NeuronProfile, Profile, name_editor

EDITORS = {"d4s": D4S, "ireva": IReVa}


def require_editor(name: str) -> str:
    """The name, if there is such an editor. Raises UnknownNameError."""
    if name not in EDITORS:
        raise UnknownNameError(f"editor: expected one of {', '.join(EDITORS)}, found {name!r}")
    return name


def make_editor(
    name: str,
    profile: AnyProfile,
    moments: Moments | None,
    layout: ModelLayout,
    *,
    chunk_tokens: int | None = None,
    **limits: Any,
) -> Editor[Any]:
    """An editor for one base and profile.

    Args:
        moments: those that the profile names; None for an editor that has none.
        chunk_tokens: padded tokens of edits that are read or optimised side by side; None is the editor's own number.
        limits: what else D4S may use of this machine (`D4S`); results depend on it by rounding at most.

    Raises:
        UnknownNameError: no editor of that name.
        BaseMismatchError, EditorError: profile and moments do not fit together, or the profile is another editor's.
    """
    require_editor(name)
    width: dict[str, Any] = {} if chunk_tokens is None else {"chunk_tokens": chunk_tokens}
    if name == "d4s" and isinstance(profile, Profile) and moments is not None:
        return D4S(profile, moments, layout, **width, **limits)
    if name == "ireva" and isinstance(profile, NeuronProfile):
        return IReVa(profile, layout, **width)
    raise EditorError(f"profile: expected one for the editor {name!r}, found one for {name_editor(profile)!r}")
