"""What a version of a model consists of: base, profile, layers of edits, and the recipe they were made by (design §4)."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from errata.edits import canonical_json, digest_of
from errata.errors import FormatError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PairRef(_Record):
    """One stored pair: a row of a pairs object."""

    pairs: str
    row: int


class Change(_Record):
    """Rows of one pairs object added to or removed from a state. A change list is what one commit does to one layer."""

    op: Literal["add", "remove"]
    pairs: str
    rows: tuple[int, ...]


class StateRef(_Record):
    """A stored state: a snapshot and the change lists since."""

    snapshot: str | None = None
    pairs_since: tuple[str, ...] = ()
    operations: int = 0
    """Pairs added or removed since it was last built from nothing: how many roundings, or tombstones, it may carry."""
    parts: tuple[str, ...] = ()
    """Objects that the snapshot consists of besides itself."""

    @model_serializer(mode="wrap")
    def _omit_none(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Manifests from before operations were counted, or there were parts, keep their bytes."""
        return _omit(spell(self), "operations", "parts")


class Layer(_Record):
    editor: str
    editor_version: str
    artifact: str | None = None
    """None where no edits are live: this layer is the identity."""
    built_on: tuple[str, ...] = ()
    """Artifacts beneath."""
    state: StateRef = StateRef()
    parts: tuple[str, ...] = ()
    """Objects that the artifact consists of besides itself, shared with other versions."""

    @model_serializer(mode="wrap")
    def _omit_none(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _omit(spell(self), "parts")

    @property
    def stored(self) -> list[str]:
        """Digests of the objects that its artifact takes."""
        return [*([self.artifact] if self.artifact else ()), *self.parts]

    @property
    def state_stored(self) -> list[str]:
        """Digests of the objects that its state takes, the pairs apart."""
        return [*([self.state.snapshot] if self.state.snapshot else ()), *self.state.parts, *self.state.pairs_since]


class Manifest(_Record):
    """One version of one model, named by the digest of its bytes."""

    format: Literal[1] = 1
    base: str
    profile: str
    layers: tuple[Layer, ...]
    recipe: str
    """Equal wherever the same pairs were added and removed in the same order under the same options; see `extend_recipe`."""

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        return digest_of(self.to_bytes())

    @property
    def above(self) -> tuple[Layer, ...]:
        """Layers on top of the editor's: an adapter, a memory. They follow from no pairs."""
        return self.layers[1:]

    def find_above(self, editor: str) -> Layer | None:
        """The layer above that is of this kind."""
        return next((layer for layer in self.above if layer.editor == editor), None)

    @property
    def artifacts(self) -> list[str]:
        """Digests to attach, in order of application."""
        return [layer.artifact for layer in self.layers if layer.artifact]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a manifest this Errata reads."""
        try:
            return cls.model_validate_json(data)
        except ValueError as error:
            raise FormatError(f"manifest cannot be read; written by a newer Errata? {error}") from None


def replace_bottom(head: Manifest, restarted: Manifest) -> Manifest:
    """A restarted manifest with the layers that stand above the head's editor."""
    return restarted.model_copy(update={"layers": (*restarted.layers, *head.above)})


def _omit(content: dict[str, Any], *names: str) -> dict[str, Any]:
    """The content without those of `names` that are empty or 0."""
    return {name: value for name, value in content.items() if value or name not in names}


def start_recipe(base: str, profile: str, editor: str, version: str, options: Mapping[str, Any]) -> str:
    """The recipe of a stream without edits."""
    return digest_of(canonical_json({"base": base, "profile": profile, "editor": editor, "version": version, "options": dict(options)}))


def extend_recipe(recipe: str, op: str, pair_digests: Iterable[str]) -> str:
    """The recipe after adding or removing pairs, as a hash chain: a batch costs what it holds, not what came before."""
    for pair in pair_digests:
        recipe = hashlib.sha256(f"{recipe} {op} {pair}".encode()).hexdigest()
    return recipe


def group_changes(op: Literal["add", "remove"], refs: Sequence[PairRef]) -> list[Change]:
    """References as changes, one per run of rows from the same object, in order."""
    changes: list[Change] = []
    for ref in refs:
        if changes and changes[-1].pairs == ref.pairs:
            changes[-1] = changes[-1].model_copy(update={"rows": (*changes[-1].rows, ref.row)})
        else:
            changes.append(Change(op=op, pairs=ref.pairs, rows=(ref.row,)))
    return changes


def sort_refs(refs: Iterable[PairRef]) -> list[PairRef]:
    """The distinct pairs among `refs`, by object and row: the order in which each object is read once. Edits may share a pair."""
    return sorted(set(refs), key=lambda ref: (ref.pairs, ref.row))


def read_refs(changes: bytes) -> list[PairRef]:
    """The pairs that a stored change list names, in order, whatever it does with them."""
    parsed = [Change.model_validate(item) for item in json.loads(changes)]
    return [PairRef(pairs=change.pairs, row=row) for change in parsed for row in change.rows]
