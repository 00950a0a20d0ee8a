"""The log again as weights: stored pairs are merged in the order they were committed, and what is stored is compared with the result.

Commits, outcomes and pairs are primary: everything else follows from them, and that is what is checked here. z is never computed again.
Equal bytes can be had only on one machine with one set of libraries and one number of threads. Elsewhere sums differ in their last bits:
there the solved weights of both are compared in float64, and the stored float32 artifact within its rounding.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from errata.candidates import (
    Restart,
    adopt_state,
    extend_state,
    load_state,
    merge_refs,
    name_artifact,
    reload_state,
    restart_manifest,
    restart_state,
    spell_changes,
    start_manifest,
    store_artifact,
    store_state,
    take_snapshot,
)
from errata.editors.artifacts import Parts
from errata.editors.base import Blobs, Editor
from errata.editors.kinds import load_artifact
from errata.edits import digest_of, digest_written
from errata.errors import BaseMismatchError, EditorError, KeyMissingError, ObjectCorruptError
from errata.exactness import RELATIVE, measure_gap
from errata.findings import Finding, FindingState, describe_fault, find_fault
from errata.manifests import Layer, Manifest, replace_bottom
from errata.steps import Entry, Point, Remade, Site, Step, list_named

ROUNDING = 2.0**-23
"""As `RELATIVE`, for weights that were stored in float32."""


@dataclass
class Replay:
    """A walk over the accepted commits of one stream. Memory holds one state, one commit's pairs, and a few numbers per commit."""

    blobs: Blobs
    editor: Editor[Any]
    """With `base` and `profile`: where the log begins, then where the last commit's state is."""
    base: str
    profile: str
    read_step: Callable[[int], Step | None]
    """What a commit did to the state of its parent; None where that is lost."""
    mend: bool
    """Store what was damaged and comes out equal."""
    given_up: Set[str] = frozenset()
    """Weights that may be missing, because no version that needs them is kept."""
    hollow: Set[int] = frozenset()
    """Commits with pairs that were erased since: what is left of them gives other weights."""
    archived: list[int] = field(default_factory=list)
    """Commits whose stored weights are, indeed."""
    findings: list[Finding] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    """How weights were compared (`bits`, `float64`, `float32`) → commits."""
    worst: float = 0.0
    """Largest relative difference where they were not equal to the bit."""
    unverified: list[int] = field(default_factory=list)
    """Commits that could not be compared, because pairs or outcomes before them are lost."""
    parted: bool = False
    """The recipes differ, or the pairs do not fit: nothing after that commit can agree."""
    _point: Point | None = None
    _parents: dict[int, int] = field(default_factory=dict)
    _restated: dict[int, int] = field(default_factory=dict)
    _sites: dict[int, Site] = field(default_factory=dict)
    """Where the state of each commit is."""
    _snapshots: set[int] = field(default_factory=set)
    _known: dict[str, Manifest] = field(default_factory=dict)
    """Damaged manifests that were made again."""
    _gone: dict[str, FindingState] = field(default_factory=dict)
    """What is damaged, each reported once."""
    _intact: set[str] = field(default_factory=set)
    """What was read and found whole."""
    _named: set[str] = field(default_factory=set)
    """Digests that the last commit's manifest names, and its own."""

    @property
    def recipe(self) -> str | None:
        """After the last commit; None where it cannot be known."""
        return self._point.recipe if self._point else None

    def follow(self, entry: Entry, *, solve: bool, remake: bool = False) -> Remade | None:
        """Go on to the next accepted commit and compare.

        Args:
            solve: compare the weights, too; else they are solved only where they are needed to mend something.
            remake: where an object that this commit's manifest names cannot be made again bit for bit, store others in their place.

        Returns:
            The new manifest, if one was made.

        Raises:
            StorageError: the storage fails, which is not the same as an object that is missing or damaged.
        """
        before = self._point
        if entry.site is not None:
            self.editor, self.base, self.profile = entry.site.editor, entry.site.base, entry.site.profile
        self._parents[entry.seq] = entry.parent
        self._sites[entry.seq] = Site(self.editor, self.base, self.profile)
        if entry.restates is not None:
            self._restated[entry.seq] = entry.restates
        step = self.read_step(entry.seq) if entry.restates is None and entry.seq else None
        changes = spell_changes(step.add, step.remove) if step and not step.fresh and not step.adopts else None
        reached = self._reach(entry, step, solve)
        if self.parted:
            return None
        stored = self._find_manifest(entry, before, reached, changes, step)
        named, self._named = self._named, list_named(entry.manifest, stored)
        if entry.rebuilt:
            self.settle(named - self._named)
        if reached is None:
            self._point = self._resume(entry, stored, changes)
            return None
        if stored is not None:
            reached = self._compare(entry, stored, reached, changes, solve)
        self._point = Point(reached.state, reached.recipe, stored)
        return self._remake(stored, reached) if remake and self.mend and not self.parted else None

    def settle(self, digests: Set[str]) -> None:
        """A rebuild commit points to other objects instead of these."""
        for index, finding in enumerate(self.findings):
            if finding.state == "unequal" and finding.digest in digests:
                said = describe_fault(finding.detail.partition(";")[0], "replaced")
                self.findings[index] = finding.model_copy(update={"state": "replaced", "detail": said})

    def _begin(self) -> Point:
        site = self._sites[0]
        first = start_manifest(site.editor, site.base, site.profile)
        return Point(site.editor.empty_state(), first.recipe, first)

    def _reach(self, entry: Entry, step: Step | None, solve: bool) -> Point | None:
        if entry.seq == 0:
            return self._begin()
        if entry.restates is not None:
            same = self._origin(entry.restates) == self._origin(entry.parent)
            return self._point if same else self._restate(self._origin(entry.restates))
        if step is None or (self._point is None and not step.fresh):
            return None
        try:
            reached = self._merge(self._point, step, self._sites[entry.seq])
            if step.fresh and self._point is not None and entry.site is None:
                self._compare_restart(entry.seq, self._point, reached, solve)
            return reached
        except (EditorError, BaseMismatchError) as error:
            self._note(entry.seq, "pairs", "differs", f"the pairs it names do not fit the state: {error}")
            self.parted = True
        except (KeyMissingError, ObjectCorruptError):
            pass  # reported with the commit that stored them
        return None

    def _merge(self, point: Point | None, step: Step, site: Site) -> Point:
        if step.fresh:
            made = restart_state(self.blobs, site.editor, site.base, site.profile, step.add)
            return Point(made.state, made.recipe, None)
        assert point is not None, "only a fresh step stands on nothing"
        if step.adopts:
            adopted = adopt_state(site.editor, site.base, site.profile, point.state, point.recipe)
            if adopted is None:
                raise EditorError("expected sums that its profile can solve, found some that it cannot")
            return Point(adopted.state, adopted.recipe, None)
        merged = merge_refs(self.blobs, site.editor, point.state, point.recipe, step.add, step.remove)
        return Point(merged.state, merged.recipe, None)

    def _origin(self, seq: int) -> int:
        """The commit that first made the state of commit `seq`."""
        while seq in self._restated:
            seq = self._restated[seq]
        return seq

    def _restate(self, seq: int) -> Point | None:
        """The state after an earlier commit, replayed once more along the commits it stands on."""
        line: list[tuple[int, Step]] = []
        while seq and not (line and line[-1][1].fresh):
            step = self.read_step(seq)
            if step is None:
                return None
            line.append((seq, step))
            seq = self._origin(self._parents[seq])
        point = self._begin()
        for earlier, step in reversed(line):
            site = self._sites[earlier]
            try:
                point = self._merge(point, step, site)
            except (KeyMissingError, ObjectCorruptError):
                return None
            if earlier in self._snapshots:
                point = Point(reload_state(site.editor, point.state), point.recipe, None)
        return point

    def _resume(self, entry: Entry, stored: Manifest | None, changes: bytes | None) -> Point | None:
        """After a loss: nothing can be compared until a snapshot, whose sums are taken as they are stored."""
        self.unverified.append(entry.seq)
        if stored is None:
            return None
        layer = stored.layers[0]
        if layer.state.pairs_since and changes is not None and digest_of(changes) == layer.state.pairs_since[-1]:
            self._check(entry.seq, "change list", layer.state.pairs_since[-1], changes)
        for digest in layer.stored:
            self._check(entry.seq, "artifact", digest, None)
        snapshot = layer.state.snapshot
        whole = [self._check(entry.seq, "snapshot", digest, None) for digest in layer.state_stored if not layer.state.pairs_since]
        if snapshot is None or not whole or not all(whole):
            return None
        self._snapshots.add(entry.seq)
        return Point(self.editor.load_state(self.blobs.fetch(snapshot), self.blobs.get), stored.recipe, stored)

    def _find_manifest(
        self, entry: Entry, before: Point | None, reached: Point | None, changes: bytes | None, step: Step | None
    ) -> Manifest | None:
        fault = find_fault(self.blobs, entry.manifest)
        if fault is None:
            return Manifest.from_bytes(self.blobs.get(entry.manifest))
        if entry.manifest in self._known:
            return self._known[entry.manifest]
        if reached is not None:
            for guess in self._guess_manifests(entry, before, reached, changes, step):
                if guess.digest == entry.manifest:
                    self._check(entry.seq, "manifest", entry.manifest, guess.to_bytes())
                    self._known[entry.manifest] = guess
                    return guess
        self._report(entry.seq, "manifest", entry.manifest, fault, "lost" if reached is None else "unequal")
        return None

    def _guess_manifests(
        self, entry: Entry, before: Point | None, reached: Point, changes: bytes | None, step: Step | None
    ) -> Iterator[Manifest]:
        """What the manifest of a commit can have been: with a snapshot, or without."""
        if entry.seq == 0:
            yield start_manifest(self.editor, self.base, self.profile)
        if step is not None and step.fresh:
            yield self._spell_restart(reached, 0)
            yield from [replace_bottom(before.manifest, self._spell_restart(reached, 0))] if before and before.manifest else []
        if before is None or before.manifest is None:
            return
        if step is not None and step.adopts:
            yield replace_bottom(before.manifest, self._spell_restart(reached, before.manifest.layers[0].state.operations))
        if changes is None:
            return
        layer = before.manifest.layers[0]
        weights, since = name_artifact(self.editor.solve(reached.state)), extend_state(layer.state, changes)
        for state in (since, take_snapshot(since, digest_written(reached.state.write), reached.state.parts)):
            built = layer.model_copy(update={**weights, "state": state})
            yield before.manifest.model_copy(update={"layers": (built, *before.manifest.above), "recipe": reached.recipe})

    def _spell_restart(self, reached: Point, operations: int) -> Manifest:
        weights = name_artifact(self.editor.solve(reached.state))
        snapshot = digest_written(reached.state.write) if reached.state.count else None
        return restart_manifest(self.editor, self.base, self.profile, Restart(reached.state, reached.recipe), weights, snapshot, operations)

    def _compare_restart(self, seq: int, before: Point, after: Point, solve: bool) -> None:
        """What a compaction summed anew must be what the log had led to."""
        if before.state.count != after.state.count:
            self._note(seq, "live list", "differs", f"expected {before.state.count} pairs from the log, found {after.state.count}")
        elif solve:
            gap = measure_gap(self.editor.solve_exact(after.state), self.editor.solve_exact(before.state))
            self.worst = max(self.worst, gap)
            if gap > RELATIVE:
                said = f"expected weights within {RELATIVE:.1e} of those before, found them {gap:.1e} apart: other pairs were summed"
                self._note(seq, "live list", "differs", said)

    def _compare(self, entry: Entry, stored: Manifest, reached: Point, changes: bytes | None, solve: bool) -> Point:
        """The point to go on from: where a snapshot was taken, the state is read back from it, as the next batch does."""
        seq, layer = entry.seq, stored.layers[0]
        if (stored.base, stored.profile, stored.recipe) != (self.base, self.profile, reached.recipe):
            self._note(seq, "recipe", "differs", f"expected {reached.recipe} from the log, found {stored.recipe} in the manifest")
            self.parted = True
            return reached
        if changes is not None and layer.state.pairs_since:
            ours = digest_of(changes)
            if layer.state.pairs_since[-1] != ours:
                self._note(seq, "change list", "differs", f"expected {ours} from the outcomes, found {layer.state.pairs_since[-1]}")
            else:
                self._check(seq, "change list", ours, changes)
        elif changes is not None and layer.state.snapshot is None:
            self._note(seq, "manifest", "differs", "expected a state, found none", entry.manifest)
        self._compare_weights(seq, layer, reached, solve)
        for digest in (name for above in stored.above for name in above.stored):  # they follow from no pairs
            self._check(seq, "artifact", digest, None)
        if layer.state.snapshot is None or layer.state.pairs_since:
            return reached
        self._check(seq, "snapshot", layer.state.snapshot, reached.state.to_bytes())
        self._check_parts(seq, "snapshot", layer.state.parts, reached.state.parts)
        self._snapshots.add(seq)
        return Point(reload_state(self.editor, reached.state), reached.recipe, stored)

    def _compare_weights(self, seq: int, layer: Layer, reached: Point, solve: bool) -> None:
        faults = {digest: self._find_fault(digest) for digest in layer.stored}
        fault = next(filter(None, faults.values()), None)
        if not solve and fault is None:
            return
        if layer.artifact is not None and ("erased" in faults.values() or seq in self.hollow):
            self._report(seq, "artifact", layer.artifact, "erased", "erased")
            return
        given_up = [digest for digest, state in faults.items() if state == "missing" and digest in self.given_up]
        for digest in given_up:
            self._report(seq, "artifact", digest, "missing", "archived")
        if given_up:
            return
        artifact = self.editor.solve(reached.state)
        data = artifact.to_bytes() if artifact else None
        ours = digest_of(data) if data else None
        if ours == layer.artifact:
            self.compared["bits"] += 1
            if artifact is not None and data is not None:
                self._check(seq, "artifact", digest_of(data), data)
                self._check_parts(seq, "artifact", layer.parts, artifact.parts)
        elif layer.artifact is None or ours is None:
            found, expected = ("none", "some") if ours else ("some", "none")
            self._note(seq, "artifact", "differs", f"expected {expected}, found {found}", layer.artifact)
        elif fault is not None:
            self._report(seq, "artifact", layer.artifact, fault, "unequal")
        else:
            self._measure(seq, layer, reached)

    def _measure(self, seq: int, layer: Layer, reached: Point) -> None:
        """Compare weights whose bytes differ."""
        assert layer.artifact is not None
        exact = self.editor.solve_exact(reached.state)
        gap, bound, how = measure_gap(exact, load_artifact(self.blobs.get(layer.artifact), self.blobs.get).written), ROUNDING, "float32"
        if gap <= bound:
            with suppress(KeyMissingError, ObjectCorruptError):  # its state may not be whole: the stored weights must do then
                theirs = self.editor.solve_exact(load_state(self.blobs, self.editor, layer.state))
                gap, bound, how = measure_gap(exact, theirs), RELATIVE, "float64"
        self.worst = max(self.worst, gap)
        if gap <= bound:
            self.compared[how] += 1
        else:
            said = f"expected weights within {bound:.1e} ({how}) of those of the stored pairs, found them {gap:.1e} apart"
            self._note(seq, "artifact", "differs", said, layer.artifact)

    def _remake(self, stored: Manifest | None, reached: Point) -> Remade | None:
        gone = {digest for digest in self._named if self._gone.get(digest) == "unequal"}
        if not gone:
            return None
        layer = stored.layers[0] if stored else Layer(editor=self.editor.name, editor_version=self.editor.version)
        changed: dict[str, Any] = {}
        if stored is None or {*layer.stored} & gone:
            changed |= store_artifact(self.blobs, self.editor.solve(reached.state))
        if stored is None or {*layer.state_stored} & gone:
            changed["state"] = take_snapshot(layer.state, store_state(self.blobs, reached.state), reached.state.parts)
        built = layer.model_copy(update=changed)
        layers = (built, *(stored.above if stored else ()))
        manifest = Manifest(base=self.base, profile=self.profile, layers=layers, recipe=reached.recipe)
        return Remade(self.blobs.put(manifest.to_bytes()), frozenset(gone))

    def _check_parts(self, seq: int, what: str, stored: Sequence[str], made: Parts) -> None:
        """As `_check`, for the parts of an object."""
        for digest in filter(self._find_fault, stored):
            self._check(seq, what, digest, made[digest]() if digest in made else None)

    def _find_fault(self, digest: str) -> str | None:
        """As `find_fault`; what was intact before is not read again, since versions share parts."""
        fault = None if digest in self._intact else find_fault(self.blobs, digest)
        self._intact |= set() if fault else {digest}
        return fault

    def _check(self, seq: int, what: str, digest: str, data: bytes | None) -> bool:
        """Whether a stored object is intact, or is now.

        Args:
            data: what the replay makes of it; None where it cannot.
        """
        fault = self._find_fault(digest)
        if fault is None:
            return True
        if fault == "erased" or (fault == "missing" and digest in self.given_up):
            self._report(seq, what, digest, fault, "erased" if fault == "erased" else "archived")
        elif data is None:
            self._report(seq, what, digest, fault, "lost")
        elif digest_of(data) != digest:
            self._report(seq, what, digest, fault, "unequal")
        elif self.mend:
            self.blobs.put(data)
            self._report(seq, what, digest, fault, "mended")
            return True
        else:
            self._report(seq, what, digest, fault, "mendable")
        return False

    def _report(self, seq: int, what: str, digest: str, fault: str, state: FindingState) -> None:
        if digest not in self._gone:
            self._gone[digest] = state
            if state == "archived":
                self.archived.append(seq)
                return
            self._note(seq, what, state, describe_fault(fault, state), digest)

    def _note(self, seq: int, what: str, state: FindingState, detail: str, digest: str | None = None) -> None:
        self.findings.append(Finding(commit=seq, what=what, state=state, detail=detail, digest=digest))
