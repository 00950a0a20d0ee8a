"""From stored pairs to a candidate: prepare what is missing, merge, solve. The head and the base are never changed (design §3)."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from errata.editors.artifacts import Artifact, Parts
from errata.editors.base import Blobs, Editor, Pairs, Progress, State, list_units
from errata.editors.kinds import load_artifact
from errata.edits import Edit, canonical_json, digest_of
from errata.manifests import Change, Layer, Manifest, PairRef, StateRef, extend_recipe, group_changes, read_refs, sort_refs, start_recipe
from errata.modeling.loading import Base

Remember = Callable[[str, Mapping[str, Sequence[float]]], None]

_CHUNK = 50
"""Edits prepared between two writes: what an interrupted run has to do again."""
_BLOCK = 500
"""Pairs in memory at once where a state is summed from nothing. Sums of other blocks differ in their last bits."""


class StoredPair(BaseModel):
    """A pair that an earlier, interrupted run has stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: PairRef
    losses: tuple[float | None, ...]
    """Of its edits in canonical order: nats per token of the target that are left at z; None where that is not known."""


class PreparedBatch(BaseModel):
    """Where the pairs of a batch are stored, and what became of each edit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    refs: dict[str, PairRef] = {}
    """Edit id → its stored pair; edits of one group have the same."""
    losses: dict[str, float | None] = {}
    """Edit id → nats per token of its target that are left at z; None where that is not known."""
    refused: dict[str, str] = {}
    """Edit id → why no pair can be made."""


def start_manifest(editor: Editor[Any], base: str, profile: str) -> Manifest:
    """The manifest of a stream without edits: the base itself."""
    layer = Layer(editor=editor.name, editor_version=editor.version)
    return Manifest(
        base=base, profile=profile, layers=(layer,), recipe=start_recipe(base, profile, editor.name, editor.version, editor.options)
    )


def prepare_batch(
    blobs: Blobs,
    editor: Editor[Any],
    base: Base,
    edits: Sequence[Edit],
    known: Mapping[str, StoredPair],
    remember: Remember,
    on_progress: Progress | None = None,
    groups: Sequence[Sequence[str]] = (),
    state: State | None = None,
    spread: Callable[[Sequence[Sequence[Edit]]], Iterable[PreparedBatch]] | None = None,
) -> PreparedBatch:
    """Pairs of a batch: those of an earlier, interrupted run are reused, the others are made and stored chunk by chunk.

    Args:
        known: name of a pair (`name_pair`) → pair stored by an earlier run.
        remember: called with (digest of a stored pairs object, name → losses of its rows, in order) right after each write.
        groups: ids of edits that share one pair.
        state: what the pairs will be added to, without those that leave. Only an editor that is not order-free asks for it: each chunk is
            prepared on it and on the pairs of the batch that are there already.
        spread: does to several chunks what `prepare_chunk` does to one, elsewhere; None does it here. Chunks that depend on each other
            stay here.
    """
    by_id = {edit.edit_id: edit for edit in edits}
    refs: dict[str, PairRef] = {}
    losses: dict[str, float | None] = {}
    missing: list[tuple[str, ...]] = []
    for unit in list_units(by_id, groups):
        stored = known.get(name_pair([by_id[edit_id] for edit_id in unit]))
        if stored is None:
            missing.append(unit)
            continue
        refs |= dict.fromkeys(unit, stored.ref)
        losses |= dict(zip(unit, stored.losses, strict=True))
    chunks = [[by_id[edit_id] for unit in chunk for edit_id in unit] for chunk in _cut(missing)]
    ground = None if editor.order_free else editor.merge(state or editor.empty_state(), read_pairs(blobs, sort_refs(refs.values())), None)

    def prepare_here() -> Iterator[PreparedBatch]:
        on, done = ground, len(refs)
        for chunk in chunks:
            part = prepare_chunk(blobs, editor, base, chunk, remember, _shift_progress(on_progress, done, len(edits)), groups, on)
            if on is not None:
                on = editor.merge(on, read_pairs(blobs, sort_refs(part.refs.values())), None)
            done += len(chunk)
            yield part

    refused: dict[str, str] = {}
    for part in spread(chunks) if spread and len(chunks) > 1 and ground is None else prepare_here():
        refs, losses, refused = refs | part.refs, losses | part.losses, refused | part.refused
    return PreparedBatch(refs=refs, losses=losses, refused=refused)


def prepare_chunk(
    blobs: Blobs,
    editor: Editor[Any],
    base: Base,
    edits: Sequence[Edit],
    remember: Remember,
    on_progress: Progress | None = None,
    groups: Sequence[Sequence[str]] = (),
    state: State | None = None,
) -> PreparedBatch:
    """Make and store the pairs of a part of a batch, in one object. Arguments as of `prepare_batch`."""
    by_id = {edit.edit_id: edit for edit in edits}
    prepared = editor.prepare(base, edits, on_progress, groups, state)
    if prepared.pairs is None:
        return PreparedBatch(refused=dict(prepared.refused))
    digest = blobs.put(prepared.pairs.to_bytes())
    left = {edit_id: prepared.notes[edit_id].target_nll for owners in prepared.pairs.owners for edit_id in owners}
    names = [name_pair([by_id[edit_id] for edit_id in owners]) for owners in prepared.pairs.owners]
    remember(digest, {name: [left[i] for i in owners] for name, owners in zip(names, prepared.pairs.owners, strict=True)})
    refs = {edit_id: PairRef(pairs=digest, row=row) for row, owners in enumerate(prepared.pairs.owners) for edit_id in owners}
    return PreparedBatch(refs=refs, losses={**left}, refused=dict(prepared.refused))


def name_pair(edits: Sequence[Edit]) -> str:
    """What makes a pair that of these edits: their contents, and their ids too, since a pair names its owners.

    Args:
        edits: those that share it, in canonical order.
    """
    return " ".join(f"{edit.edit_id} {edit.content_id}" for edit in edits)


def _cut(units: Sequence[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Units in runs of about `_CHUNK` edits."""
    chunk: list[tuple[str, ...]] = []
    for unit in units:
        if chunk and sum(map(len, chunk)) + len(unit) > _CHUNK:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk


def _shift_progress(on_progress: Progress | None, done: int, total: int) -> Progress | None:
    """The progress of one chunk as progress of the whole batch."""
    if on_progress is None:
        return None
    return lambda more, _: on_progress(done + more, total)


@dataclass(frozen=True)
class Candidate:
    """A built, not yet judged manifest."""

    manifest: Manifest
    fits: Mapping[str, float]
    """Edit id → ρ, the fraction of its residual that the solve realises."""


def build_candidate(
    blobs: Blobs,
    editor: Editor[Any],
    head: Manifest,
    add: Sequence[PairRef],
    remove: Sequence[PairRef],
    snapshot_every: int,
) -> Candidate:
    """Merge pairs into the head's state and solve. Everything stored is content-addressed: harmless if the batch stops here.

    Raises:
        BaseMismatchError: pairs of another base or profile.
        EditorError: the system cannot be solved.
    """
    layer = head.layers[0]
    merged = merge_refs(blobs, editor, load_state(blobs, editor, layer.state), head.recipe, add, remove)
    artifact = editor.solve(merged.state)
    blobs.put(merged.changes)
    stored, there = extend_state(layer.state, merged.changes), {*layer.parts, *layer.state.parts}
    if len(stored.pairs_since) >= snapshot_every:
        stored = take_snapshot(stored, store_state(blobs, merged.state, there), merged.state.parts)
    built = layer.model_copy(update={**store_artifact(blobs, artifact, there), "state": stored})
    manifest = head.model_copy(update={"layers": (built, *head.above), "recipe": merged.recipe})
    return Candidate(manifest, _measure_fits(editor, merged.state, merged.added))


@dataclass(frozen=True)
class Merged:
    """What one commit does to a state."""

    state: Any
    recipe: str
    changes: bytes
    """The change list, as it is stored."""
    added: Pairs | None


def merge_refs(blobs: Blobs, editor: Editor[Any], state: Any, recipe: str, add: Sequence[PairRef], remove: Sequence[PairRef]) -> Merged:
    """A state and its recipe after one commit: pairs are removed, then added, in one merge.

    Raises:
        StorageError: a pairs object cannot be read.
        BaseMismatchError, EditorError: the pairs are not of this base and profile, or not in this state.
    """
    removed, added = read_pairs(blobs, remove), read_pairs(blobs, add)
    for op, pairs in (("remove", removed), ("add", added)):
        recipe = extend_recipe(recipe, op, pairs.digest_rows() if pairs else ())
    return Merged(editor.merge(state, added, removed), recipe, spell_changes(add, remove), added)


def spell_changes(add: Sequence[PairRef], remove: Sequence[PairRef]) -> bytes:
    """The change list of one commit, as it is stored."""
    return canonical_json([change.model_dump() for change in group_changes("remove", remove) + group_changes("add", add)])


def extend_state(ref: StateRef, changes: bytes) -> StateRef:
    """A stored state after one more change list."""
    since = (*ref.pairs_since, digest_of(changes))
    return StateRef(snapshot=ref.snapshot, pairs_since=since, operations=ref.operations + len(read_refs(changes)))


def take_snapshot(ref: StateRef, snapshot: str, parts: Parts) -> StateRef:
    """The same state as what `State.write` wrote, with the parts that it names."""
    return StateRef(snapshot=snapshot, operations=ref.operations, parts=tuple(parts))


def name_artifact(artifact: Artifact | None) -> dict[str, Any]:
    """The fields of a layer that say where an artifact lies."""
    return {"artifact": digest_of(artifact.to_bytes()) if artifact else None, "parts": tuple(artifact.parts) if artifact else ()}


def store_artifact(blobs: Blobs, artifact: Artifact | None, there: Collection[str] = ()) -> dict[str, Any]:
    """Store an artifact with its parts; `name_artifact` of it.

    Args:
        there: parts that are stored, because the head names them.
    """
    if artifact is None:
        return name_artifact(None)
    _store_parts(blobs, artifact.parts, there)
    return {"artifact": blobs.put(artifact.to_bytes()), "parts": tuple(artifact.parts)}


def store_state(blobs: Blobs, state: State, there: Collection[str] = ()) -> str:
    """Store a state with its parts; the digest of what it writes itself. Arguments as of `store_artifact`."""
    _store_parts(blobs, state.parts, there)
    return blobs.put_from(state.write)


def _store_parts(blobs: Blobs, parts: Parts, there: Collection[str]) -> None:
    for digest, read in parts.items():
        if digest not in there:
            blobs.put(read())


def reload_state(editor: Editor[Any], state: State) -> Any:
    """A state as whoever reads what it writes has it."""
    return editor.load_state(state.to_bytes(), lambda digest: state.parts[digest]())


@dataclass(frozen=True)
class Restart:
    """A state in one piece, from which a stream goes on, and its recipe."""

    state: Any
    recipe: str


def restart_state(blobs: Blobs, editor: Editor[Any], base: str, profile: str, refs: Sequence[PairRef]) -> Restart:
    """Sum pairs from nothing, in blocks and in one fixed order, whatever order they come in: equal sets give equal bytes on one machine.
    The recipe adds them in the order of their row digests, hence does not know in which objects they lie.

    Raises:
        StorageError: a pairs object cannot be read.
        BaseMismatchError: the pairs are not of this base and profile.
    """
    state, digests = editor.empty_state(), list[str]()
    for block in read_blocks(blobs, refs):
        digests += block.digest_rows()
        state = editor.merge(state, block, None)
    return Restart(state, extend_recipe(start_manifest(editor, base, profile).recipe, "add", sorted(digests)))


def adopt_state(editor: Editor[Any], base: str, profile: str, state: Any, recipe: str) -> Restart | None:
    """The same sums under another solve part, `editor` being that of the new profile. The recipe gets one more link, which is the recipe
    that a stream without edits has there: base, profile, editor and options. None where the pairs have to be summed anew.

    Raises:
        BaseMismatchError: the profile has another base or other prepare options.
    """
    carried = editor.carry_state(state)
    if carried is None:
        return None
    return Restart(carried, extend_recipe(recipe, "solve", [start_manifest(editor, base, profile).recipe]))


def restart_manifest(
    editor: Editor[Any], base: str, profile: str, made: Restart, weights: Mapping[str, Any], snapshot: str | None, operations: int = 0
) -> Manifest:
    """The manifest of a restarted state.

    Args:
        weights: `name_artifact` of what it solves to.
        snapshot: digest of what the state writes; None for an empty one.
        operations: as in `StateRef`.
    """
    state = StateRef(operations=operations)
    if snapshot is not None:
        state = take_snapshot(state, snapshot, made.state.parts)
    layer = Layer(editor=editor.name, editor_version=editor.version, state=state, **weights)
    return Manifest(base=base, profile=profile, layers=(layer,), recipe=made.recipe)


def store_restart(blobs: Blobs, editor: Editor[Any], base: str, profile: str, made: Restart, operations: int = 0) -> Manifest:
    """Solve a restarted state and store it; its manifest, which is not stored yet. Arguments as of `restart_manifest`.

    Raises:
        EditorError: the system cannot be solved.
    """
    weights = store_artifact(blobs, editor.solve(made.state))
    snapshot = store_state(blobs, made.state) if made.state.count else None
    return restart_manifest(editor, base, profile, made, weights, snapshot, operations)


def build_anew(blobs: Blobs, editor: Editor[Any], base: str, profile: str, refs: Sequence[PairRef]) -> Candidate:
    """A candidate that stands on no head: the base with these pairs.

    Raises:
        BaseMismatchError: the pairs are not of this base and profile.
        EditorError: the system cannot be solved.
    """
    made = restart_state(blobs, editor, base, profile, refs)
    manifest = store_restart(blobs, editor, base, profile, made)
    fits: dict[str, float] = {}
    for block in read_blocks(blobs, refs):
        fits |= _measure_fits(editor, made.state, block)
    return Candidate(manifest, fits)


def repack_pairs(blobs: Blobs, refs: Sequence[PairRef]) -> dict[PairRef, PairRef]:
    """Copy pairs into as few objects as one commit can name; where each lies now."""
    ordered, places = iter(sort_refs(refs)), dict[PairRef, PairRef]()
    for block in read_blocks(blobs, refs):
        digest = blobs.put(block.to_bytes())
        places |= {next(ordered): PairRef(pairs=digest, row=row) for row in range(len(block))}
    return places


def load_state(blobs: Blobs, editor: Editor[Any], ref: StateRef) -> Any:
    """The state a manifest names: its snapshot with the change lists since replayed in order, each in one merge as it was made, since
    sums that are formed in other groups differ in their last bits."""
    state: State = editor.load_state(blobs.fetch(ref.snapshot), blobs.get) if ref.snapshot else editor.empty_state()
    for digest in ref.pairs_since:
        changes = [Change.model_validate(item) for item in json.loads(blobs.get(digest))]
        added, removed = (_read_changes(blobs, [change for change in changes if change.op == op]) for op in ("add", "remove"))
        state = editor.merge(state, added, removed)
    return state


def load_artifacts(blobs: Blobs, manifest: Manifest) -> list[Artifact]:
    """The artifacts of a manifest, ready to attach in this order."""
    return [load_artifact(blobs.get(digest), blobs.get) for digest in manifest.artifacts]


def read_pairs(blobs: Blobs, refs: Sequence[PairRef]) -> Pairs | None:
    """The stored pairs, in the order of `refs`; each object is read once."""
    return _read_changes(blobs, group_changes("add", refs))


def read_blocks(blobs: Blobs, refs: Iterable[PairRef], on_progress: Progress | None = None) -> Iterator[Pairs]:
    """Stored pairs in blocks that fit in memory, each once, in the order of `sort_refs`. Raises StorageError: one cannot be read."""
    ordered = sort_refs(refs)
    for start in range(0, len(ordered), _BLOCK):
        block = read_pairs(blobs, ordered[start : start + _BLOCK])
        assert block is not None, "a block has rows"
        yield block
        if on_progress:
            on_progress(min(start + _BLOCK, len(ordered)), len(ordered))


def _read_changes(blobs: Blobs, changes: Sequence[Change]) -> Pairs | None:
    if not changes:
        return None
    objects = {digest: Pairs.from_bytes(blobs.get(digest)) for digest in dict.fromkeys(change.pairs for change in changes)}
    return Pairs.concatenate([objects[change.pairs].take(change.rows) for change in changes])


def _measure_fits(editor: Editor[Any], state: Any, added: Pairs | None) -> dict[str, float]:
    if added is None:
        return {}
    fits = editor.measure_fits(state, added).tolist()
    return {owner: fit for owners, fit in zip(added.owners, fits, strict=True) for owner in owners}
