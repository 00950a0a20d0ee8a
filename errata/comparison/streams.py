"""Our own editors as methods of the comparison: batches are grouped, prepared and summed as a stream does it, in memory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.comparison.method import Bench, Recipe
from errata.editors.artifacts import Artifact
from errata.editors.base import Editor, Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.ireva.editor import IReVa
from errata.edits import Edit, digest_of
from errata.grouping import Placed, Regrouping, regroup
from errata.manifests import PairRef
from errata.modeling.loading import Base
from errata.profiles import Retrofit


@dataclass
class Ledger:
    """Who is live, and on which pair, while a stream grows in memory."""

    live: dict[str, Edit] = field(default_factory=dict)
    """Slot → its edit, in order of arrival."""
    refs: dict[str, PairRef] = field(default_factory=dict)
    """Edit id → its pair; of edits that were replaced, too."""

    def arrange(self, editor: Editor[Any], base: Base, coming: Sequence[Edit], *, grouped: bool = True) -> Regrouping:
        """Which pairs change when a batch comes: what a slot had before leaves.

        Args:
            coming: one edit per slot.
            grouped: edits of one subject may share a pair; else each has one of its own.
        """
        slots = dict.fromkeys(edit.slot for edit in coming)
        replaced = [self.live[slot] for slot in slots if slot in self.live]
        leaving = [self.refs[edit.edit_id] for edit in replaced]
        if not grouped:
            return Regrouping(tuple(coming), (), tuple(leaving))
        subjects = {edit.subject_key for edit in (*coming, *replaced)}
        others = [edit for slot, edit in self.live.items() if slot not in slots and edit.subject_key in subjects]
        return regroup(editor, base, coming, [Placed(edit, self.refs[edit.edit_id]) for edit in others], leaving)

    def settle(self, coming: Sequence[Edit], refs: Mapping[str, PairRef]) -> None:
        """The batch is in. `refs`: edit id → its new pair, of older edits that were grouped anew, too."""
        for edit in coming:
            self.live.pop(edit.slot, None)
            self.live[edit.slot] = edit
        self.refs |= refs

    def forget(self, ids: Collection[str]) -> None:
        """Edits whose pair is gone."""
        self.live = {slot: edit for slot, edit in self.live.items() if edit.edit_id not in ids}


class EditorStream:
    """A stream of one editor. Equal edits in equal batches give equal artifacts."""

    def __init__(self, base: Base, editor: Editor[Any], *, grouped: bool = True) -> None:
        """
        Args:
            grouped: as of `Ledger.arrange`.
        """
        self._base, self._editor, self._grouped = base, editor, grouped
        self._state, self._ledger = editor.empty_state(), Ledger()
        self._blocks: dict[str, Pairs] = {}
        self.refused: dict[str, str] = {}
        """Edit id → why it has no pair. What it was to replace stays."""

    @property
    def live(self) -> list[Edit]:
        """In order of arrival."""
        return list(self._ledger.live.values())

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`."""
        coming = {edit.slot: edit for edit in edits}
        while coming:
            batch = list(coming.values())
            changed = self._ledger.arrange(self._editor, self._base, batch, grouped=self._grouped)
            without = self._editor.merge(self._state, None, self._read(changed.remove))
            prepared = self._editor.prepare(self._base, changed.edits, groups=changed.groups, state=without)
            self.refused |= prepared.refused
            coming = {slot: edit for slot, edit in coming.items() if edit.edit_id not in prepared.refused}
            if len(coming) < len(batch):
                continue  # without those that are refused others may be grouped otherwise
            self._state = self._editor.merge(without, prepared.pairs, None)
            self._ledger.settle(batch, self._keep(prepared.pairs))
            self._ledger.forget(prepared.refused)
            return

    def build_artifacts(self) -> list[Artifact]:
        """See `Method.build_artifacts`: what the state is solved to, now."""
        artifact = self._editor.solve(self._state)
        return [] if artifact is None else [artifact]

    def count_bytes(self) -> int:
        """Bytes of the state as a stream stores it. Not the pairs of sums, which lie unread until they are subtracted."""
        return len(self._state.to_bytes()) + sum(len(read()) for read in self._state.parts.values())

    def _read(self, refs: Sequence[PairRef]) -> Pairs | None:
        return Pairs.concatenate([self._blocks[ref.pairs].take([ref.row]) for ref in refs]) if refs else None

    def _keep(self, pairs: Pairs | None) -> dict[str, PairRef]:
        if pairs is None:
            return {}
        name = digest_of(pairs.to_bytes())
        self._blocks[name] = pairs
        return {edit_id: PairRef(pairs=name, row=row) for row, owners in enumerate(pairs.owners) for edit_id in owners}


def start_d4s(bench: Bench) -> EditorStream:
    return EditorStream(bench.base, D4S(bench.profile, bench.moments, bench.base.layout))


def start_d4s_code(bench: Bench) -> EditorStream:
    prepare = bench.profile.prepare.model_copy(update={"keying": "cascade"})
    solve = bench.profile.solve.model_copy(update={"spread": "d4s_code"})
    profile = bench.profile.model_copy(update={"prepare": prepare, "solve": solve})
    return EditorStream(bench.base, D4S(profile, bench.moments, bench.base.layout), grouped=False)


def start_ireva(bench: Bench) -> EditorStream:
    return EditorStream(bench.base, IReVa(bench.neurons, bench.base.layout))


def start_retrofitted(bench: Bench) -> EditorStream:
    gate = bench.neurons.solve
    prepare = bench.neurons.prepare.model_copy(update={"retrofit": Retrofit(theta=gate.theta, gain=gate.gain)})
    return EditorStream(bench.base, IReVa(bench.neurons.model_copy(update={"prepare": prepare}), bench.base.layout))


_D4S = "D4S (nlpkeg/D4S: easyeditor/models/memit/memit_main.py; algorithms.md §1)"
_IREVA = "Retrievable and interpretable model editing, ACL Findings 2025 (timberflow/iReVa at 89c680e; algorithms.md §3)"
_SEED_FREE = "nothing in it is drawn at random, so seeds differ by their edits alone"

OWN_RECIPES = (
    Recipe(
        name="d4s",
        title="D4S",
        source=_D4S,
        build=start_d4s,
        differs="the profile's spread, keys read from the base, edits of one subject with one key share a pair, step size relative to ‖h‖; "
        f"a re-edit subtracts what it replaces; {_SEED_FREE}",
    ),
    Recipe(
        name="d4s_code",
        title="D4S, as published",
        source=_D4S,
        build=start_d4s_code,
        differs="layers, contexts, λ and options of z are the profile's; a re-edit subtracts what it replaces, where the published code "
        f"adds; {_SEED_FREE}",
    ),
    Recipe(
        name="ireva",
        title="iReVa",
        source=_IREVA,
        build=start_ireva,
        differs="neurons are not trained; below the threshold exactly silent; a re-edit leaves a tombstone of what it replaces; "
        f"{_SEED_FREE}",
    ),
    Recipe(
        name="ireva_retrofit",
        title="iReVa, retrofitted",
        source=_IREVA,
        build=start_retrofitted,
        differs="each neuron is trained against the base alone, the published one beside all earlier; below the threshold exactly silent",
    ),
)
