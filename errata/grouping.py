"""Which pairs a change of live edits touches: edits that must share a pair are grouped anew wherever one comes or goes (design §5)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from errata.editors.base import Editor, list_units
from errata.edits import Edit
from errata.manifests import PairRef
from errata.modeling.loading import Base


class Placed(NamedTuple):
    """A live edit and the pair that carries it, alone or with others."""

    edit: Edit
    ref: PairRef


@dataclass(frozen=True)
class Regrouping:
    """What happens to pairs when edits come and go."""

    edits: tuple[Edit, ...]
    """Those that get a new pair: the ones that come, then older ones whose group changes."""
    groups: tuple[tuple[str, ...], ...]
    """Which of them share it: ids in canonical order."""
    remove: tuple[PairRef, ...]
    """Pairs that are subtracted, each once."""


def regroup(editor: Editor[Any], base: Base, coming: Sequence[Edit], staying: Sequence[Placed], leaving: Iterable[PairRef]) -> Regrouping:
    """Group edits anew.

    Args:
        coming: edits that are added.
        staying: all other edits, live before and after, of the subjects that come or go.
        leaving: pairs of the edits that go.

    Raises:
        BaseMismatchError: the editor is for another base.
    """
    everyone = {edit.edit_id: edit for edit in (*coming, *(placed.edit for placed in staying))}
    groups = editor.find_groups(base, list(everyone.values())) if len(everyone) > 1 else ()
    held = {placed.edit.edit_id: placed.ref for placed in staying}
    owners = defaultdict(set)
    for edit_id, ref in held.items():
        owners[ref].add(edit_id)
    remove = dict.fromkeys(leaving)
    shrunk = set(remove)
    changed: list[tuple[str, ...]] = []
    for unit in list_units(everyone, groups):
        # Unchanged only where all its edits, and no others, have one pair that nobody leaves.
        refs = {held.get(edit_id) for edit_id in unit}
        shared = refs.pop()
        if refs or shared is None or shared in shrunk or owners[shared] != set(unit):
            changed.append(unit)
            remove |= dict.fromkeys(held[edit_id] for edit_id in unit if edit_id in held)
    edits = tuple(everyone[edit_id] for unit in changed for edit_id in unit)
    return Regrouping(edits, tuple(unit for unit in changed if len(unit) > 1), tuple(remove))
