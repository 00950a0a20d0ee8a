"""The log again as weights, over random pairs: no model is needed to add, subtract and solve."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from errata.candidates import build_candidate, load_artifacts, load_state, start_manifest
from errata.compaction import compact_state
from errata.editors.artifacts import WeightDelta
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.state import D4SState
from errata.errors import KeyMissingError
from errata.exactness import measure_gap
from errata.findings import find_fault
from errata.manifests import Manifest, PairRef
from errata.modeling.layout import LAYOUTS
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.replay import Replay
from errata.steps import Entry, Remade, Step, list_named
from registry.erased import ErasureRecord, Gone, announce
from registry.objects import ObjectStore
from registry.storage.memory import MemoryStorage

BASE, PROFILE = "b" * 64, "c" * 64
WIDTH, OUT, LAYERS = 32, 12, (0, 2)
FEW = WIDTH // 4
"""Up to so many pairs, the state is the pairs themselves."""
PREPARE = PrepareOptions(layers=LAYERS)


def make_editor() -> D4S:
    torch.manual_seed(7)
    keys = {layer: torch.randn(200, WIDTH) for layer in LAYERS}
    moments = Moments(BASE, "corpus", 0, 200, {layer: rows.T @ rows / len(rows) for layer, rows in keys.items()})
    solve = SolveOptions(lam=3.0, spread="even", moments="d" * 64)
    return D4S(Profile(base=BASE, prepare=PREPARE, solve=solve), moments, LAYOUTS["gpt2"])


class Elsewhere(D4S):
    """The editor of another machine: what it solves is `off` by so much, and its sums a little with every merge."""

    off = 3e-9

    @classmethod
    def make(cls, off: float = 3e-9) -> "Elsewhere":
        editor = make_editor()
        editor.__class__ = cls
        assert isinstance(editor, cls)
        editor.off = off
        return editor

    def solve_exact(self, state: D4SState) -> dict[str, torch.Tensor]:
        return {name: delta * (1 + self.off) for name, delta in super().solve_exact(state).items()}

    def solve(self, state: D4SState) -> WeightDelta | None:
        exact = self.solve_exact(state)
        return WeightDelta(BASE, {name: delta.float() for name, delta in exact.items()}) if exact else None

    def merge(self, state: D4SState, add: Pairs | None, remove: Pairs | None) -> D4SState:
        merged = super().merge(state, add, remove)
        return replace(merged, rk={layer: rk * (1 + self.off / 30) for layer, rk in merged.rk.items()})


@dataclass
class Book:
    """A log of one stream: what a batch, a withdrawal, a rollback and a rebuild leave behind."""

    editor: Any
    every: int = 3
    storage: MemoryStorage = field(default_factory=MemoryStorage)
    manifests: list[str] = field(default_factory=list)
    steps: dict[int, Step | None] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objects = ObjectStore(self.storage, "objects")
        self._commit(start_manifest(self.editor, BASE, PROFILE))

    def add(self, count: int, remove: Sequence[PairRef] = ()) -> list[PairRef]:
        """Commit a batch of new pairs that replaces others."""
        seq = len(self.entries)
        torch.manual_seed(seq)
        keys = {layer: torch.randn(count, WIDTH) for layer in LAYERS}
        pairs = Pairs(BASE, PREPARE.digest, tuple((f"{seq}.{row}",) for row in range(count)), torch.randn(count, OUT), keys)
        digest = self.objects.put(pairs.to_bytes()) if count else ""
        refs = [PairRef(pairs=digest, row=row) for row in range(count)]
        self._build(refs, remove)
        return refs

    def withdraw(self, refs: Sequence[PairRef]) -> None:
        self._build([], refs)

    def go_back(self, target: int) -> None:
        seq = len(self.entries)
        self.manifests.append(self.manifests[target])
        self.entries.append(Entry(seq, seq - 1, self.manifests[target], restates=target))

    def compact(self, live: Sequence[PairRef]) -> None:
        """Sum pairs anew, right or wrong."""
        self.steps[len(self.entries)] = Step(add=tuple(live), fresh=True)
        self._commit(compact_state(self.objects, self.editor, self.manifest(-1), live).manifest)

    def accept(self, remade: Remade) -> None:
        seq = len(self.entries)
        self.manifests.append(remade.manifest)
        self.entries.append(Entry(seq, seq - 1, remade.manifest, restates=seq - 1, rebuilt=True))

    def manifest(self, seq: int) -> Manifest:
        return Manifest.from_bytes(self.objects.get(self.manifests[seq]))

    def name(self, seq: int, what: str) -> str:
        """The digest of something that a commit made."""
        if what == "manifest":
            return self.manifests[seq]
        layer = self.manifest(seq).layers[0]
        found = {"artifact": layer.artifact, "snapshot": layer.state.snapshot, "change list": (*layer.state.pairs_since, None)[-2:][0]}
        assert (digest := found[what]) is not None
        return digest

    def damage(self, digest: str, *, how: str = "damaged") -> bytes:
        """Damage an object, or delete it; what it was."""
        data = self.storage.read(f"objects/{digest}")
        self.storage.delete(f"objects/{digest}")
        if how == "damaged":
            self.storage.create(f"objects/{digest}", data[:-1] + bytes([data[-1] ^ 1]))
        return data

    def replay(self, *, mend: bool = False, editor: Any = None, remake: bool = False, solve: bool = True) -> tuple[Replay, Remade | None]:
        """Walk the whole log on this machine."""
        made = Replay(self.objects, editor or make_editor(), BASE, PROFILE, self.steps.__getitem__, mend=mend)
        remade = None
        for entry in self.entries:
            remade = made.follow(entry, solve=solve, remake=remake and entry is self.entries[-1])
        return made, remade

    def _build(self, add: Sequence[PairRef], remove: Sequence[PairRef]) -> None:
        self.steps[len(self.entries)] = Step(remove=tuple(remove), add=tuple(add))
        self._commit(build_candidate(self.objects, self.editor, self.manifest(-1), add, remove, self.every).manifest)

    def _commit(self, manifest: Manifest) -> None:
        seq = len(self.entries)
        self.manifests.append(self.objects.put(manifest.to_bytes()))
        self.entries.append(Entry(seq, max(seq - 1, 0), self.manifests[-1]))


def write_book(editor: Any = None) -> Book:
    """Nine commits after the first: past the pairs kept as pairs, across snapshots, with replacements, a withdrawal and a rollback."""
    book = Book(editor or make_editor())
    first = book.add(3)
    book.add(3, remove=first[:1])
    third = book.add(6)
    book.add(4, remove=third[2:4])
    book.withdraw([first[2], third[0]])
    book.add(2)
    book.go_back(3)
    book.add(3, remove=third[1:2])
    book.withdraw(third[4:5])
    return book


@pytest.fixture
def book() -> Book:
    return write_book()


def summarise(replay: Replay) -> list[tuple[int, str, str]]:
    return [(finding.commit, finding.what, finding.state) for finding in replay.findings]


def test_an_intact_log_gives_every_byte_again(book: Book) -> None:
    replay, _ = book.replay()
    assert replay.findings == []
    # The rollback's weights are those of its target.
    assert replay.compared == {"bits": len(book.entries)}
    assert replay.recipe == book.manifest(-1).recipe
    assert (replay.worst, replay.unverified, replay.parted) == (0.0, [], False)


def test_the_state_after_a_rollback_is_that_of_its_target(book: Book) -> None:
    short = Book(make_editor(), storage=book.storage)
    short.entries, short.manifests, short.steps = book.entries[:8], book.manifests[:8], book.steps
    assert short.entries[-1].restates == 3
    assert short.replay()[0].recipe == book.manifest(3).recipe != book.manifest(5).recipe


def test_everything_taken_back_is_the_base_again() -> None:
    book = Book(make_editor())
    refs = book.add(FEW + 5)
    book.withdraw(refs)
    assert book.manifest(2).artifacts == []
    replay, _ = book.replay()
    assert (replay.findings, replay.compared) == ([], {"bits": 3})


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize(("seq", "what"), [(2, "artifact"), (8, "artifact"), (3, "snapshot"), (2, "change list"), (0, "manifest")])
def test_what_can_be_derived_is_mended_bit_for_bit(book: Book, seq: int, what: str, how: str) -> None:
    digest = book.name(seq, what)
    whole = book.damage(digest, how=how)
    replay, _ = book.replay()
    assert summarise(replay) == [(seq, what, "mendable")]
    assert replay.findings[0].digest == digest and how in replay.findings[0].detail
    assert find_fault(book.objects, digest) == how, "a check changes nothing"
    replay, _ = book.replay(mend=True, solve=False)
    assert summarise(replay) == [(seq, what, "mended")]
    assert book.objects.get(digest) == whole
    assert book.replay()[0].findings == []


@pytest.mark.parametrize("seq", [2, 3, 8])
def test_a_lost_manifest_is_made_again_with_all_that_it_names(book: Book, seq: int) -> None:
    names = ["artifact", "snapshot" if seq == 3 else "change list"]
    digests = [book.name(seq, what) for what in names]
    whole = {digest: book.damage(digest) for digest in (*digests, book.manifests[seq])}
    check, _ = book.replay()
    assert sorted(summarise(check)) == sorted((seq, what, "mendable") for what in ("manifest", *names))
    book.replay(mend=True)
    assert {digest: book.objects.get(digest) for digest in whole} == whole


def test_lost_pairs_are_named_by_silence_until_a_snapshot(book: Book) -> None:
    assert [seq for seq in range(10) if not book.manifest(seq).layers[0].state.pairs_since] == [0, 3, 6, 7]
    step = book.steps[2]
    assert step is not None
    book.damage(step.add[0].pairs)
    replay, _ = book.replay()
    # 3 has a snapshot that is whole: from there on weights can be compared. 7 goes back to 3, which is to be replayed, and has it again.
    assert (summarise(replay), replay.unverified) == ([], [2, 3, 7])
    assert replay.compared == {"bits": 7}
    book.damage(artifact := book.name(2, "artifact"))
    replay, _ = book.replay(mend=True)
    assert summarise(replay) == [(2, "artifact", "lost")], "no other bytes are blamed: there are none"
    assert find_fault(book.objects, artifact) == "damaged"


def test_a_commit_whose_outcomes_are_lost_is_passed_over(book: Book) -> None:
    book.steps[1] = None
    replay, _ = book.replay()
    assert replay.unverified == [1, 2, 3, 7], "3 has a snapshot; 7 goes back to 3, which cannot be replayed"
    assert replay.findings == []


def test_an_artifact_that_is_not_what_the_log_gives_parts(book: Book) -> None:
    """Intact, and wrong: somebody stored other weights under the commit's manifest."""
    manifest = book.manifest(-1)
    other = WeightDelta(BASE, {name: delta + 1e-3 for name, delta in load_artifacts(book.objects, manifest)[0].deltas.items()})
    layer = manifest.layers[0].model_copy(update={"artifact": book.objects.put(other.to_bytes())})
    digest = book.objects.put(manifest.model_copy(update={"layers": (layer,)}).to_bytes())
    book.entries[-1] = replace(book.entries[-1], manifest=digest)
    replay, _ = book.replay(mend=True)
    assert summarise(replay) == [(len(book.entries) - 1, "artifact", "differs")]
    assert not replay.parted


def test_another_recipe_parts_and_ends_the_walk(book: Book) -> None:
    steps = book.steps[4]
    assert steps is not None
    book.steps[4] = Step(remove=steps.remove[:1])
    replay, _ = book.replay()
    assert summarise(replay) == [(4, "recipe", "differs")]
    assert replay.parted


def test_pairs_that_do_not_fit_the_state_part() -> None:
    book = Book(make_editor())
    refs = book.add(2)
    book.withdraw(refs[:1])
    book.steps[2] = Step(remove=(refs[0], refs[0]))
    replay, _ = book.replay()
    assert summarise(replay) == [(2, "pairs", "differs")]
    assert replay.parted


def test_another_machine_agrees_in_float64() -> None:
    book = write_book(Elsewhere.make())
    replay, _ = book.replay()
    assert replay.findings == []
    # Only the manifest without edits is equal to the bit.
    assert replay.compared == {"bits": 1, "float64": len(book.entries) - 1}
    assert 0 < replay.worst < 1e-8


def test_weights_that_are_further_apart_than_rounding_part() -> None:
    book = write_book(Elsewhere.make(off=1e-6))
    replay, _ = book.replay()
    assert {what for _, what, _ in summarise(replay)} == {"artifact"}
    assert {state for _, _, state in summarise(replay)} == {"differs"}


@pytest.mark.parametrize("whats", [("artifact",), ("manifest",), ("artifact", "manifest")])
def test_on_another_machine_the_newest_state_gets_new_objects(whats: tuple[str, ...]) -> None:
    book = write_book(Elsewhere.make())
    exact = Elsewhere.make().solve_exact(load_state(book.objects, Elsewhere.make(), book.manifest(-1).layers[0].state))
    for digest in [book.name(-1, what) for what in whats]:
        book.damage(digest)
    check, nothing = book.replay(remake=True)
    assert nothing is None and {state for _, _, state in summarise(check)} == {"unequal"}
    replay, remade = book.replay(mend=True, remake=True)
    assert remade is not None
    replay.settle(remade.instead_of)
    assert {state for _, _, state in summarise(replay)} == {"replaced"}
    book.accept(remade)
    manifest = book.manifest(-1)
    assert all(find_fault(book.objects, digest) is None for digest in list_named(remade.manifest, manifest))
    assert manifest.recipe == replay.recipe
    assert measure_gap(load_artifacts(book.objects, manifest)[0].deltas, exact) < 1e-7
    again, _ = book.replay()
    assert {state for _, _, state in summarise(again)} == {"replaced"}
    # And the stream goes on from it.
    book.editor = make_editor()
    book.add(2)
    assert {state for _, _, state in summarise(book.replay()[0])} == {"replaced"}


def test_a_snapshot_that_later_commits_stand_on_is_replaced_with_the_newest_state() -> None:
    book = write_book(Elsewhere.make())
    snapshot = book.manifest(-1).layers[0].state.snapshot
    assert snapshot is not None
    book.damage(snapshot, how="missing")
    with pytest.raises(KeyMissingError):
        load_state(book.objects, make_editor(), book.manifest(-1).layers[0].state)
    _, remade = book.replay(mend=True, remake=True)
    assert remade is not None and snapshot in remade.instead_of
    book.accept(remade)
    assert book.manifest(-1).artifacts == book.manifest(-2).artifacts, "weights that are whole stay as they are"
    assert load_state(book.objects, make_editor(), book.manifest(-1).layers[0].state).count > FEW


def test_weights_of_other_names_or_shapes_are_infinitely_far() -> None:
    one = {"a": torch.ones(2, 2)}
    assert measure_gap(one, one) == 0
    assert measure_gap(one, {"b": torch.ones(2, 2)}) == float("inf")
    assert measure_gap(one, {"a": torch.ones(2, 3)}) == float("inf")
    assert measure_gap({"a": torch.full((2, 2), torch.nan)}, one) == float("inf")
    assert measure_gap({"a": torch.ones(2, 2) * 1.5}, one) == pytest.approx(0.5)


@pytest.fixture
def compacted() -> Book:
    """Sums of 15 pairs after 18 operations; compacted at 4; two commits later, a rollback across it and one to it."""
    book = Book(make_editor(), every=2)
    first, second = book.add(6), book.add(9)
    third = book.add(2, remove=first[:1])
    live = [*first[1:], *second, *third]
    book.compact(live[::-1])
    book.add(3)
    book.withdraw(live[:2])
    book.go_back(3)
    book.go_back(4)
    book.add(1)
    return book


def test_a_compaction_is_replayed_and_compared_with_both_sides(compacted: Book) -> None:
    replay, _ = compacted.replay()
    assert (replay.findings, replay.unverified, replay.parted) == ([], [], False)
    assert replay.compared == {"bits": len(compacted.entries)}
    assert 0 < replay.worst < 1e-12, "of the weights before and after"
    assert compacted.manifest(4).recipe != compacted.manifest(3).recipe
    assert replay.recipe == compacted.manifest(-1).recipe
    assert load_state(compacted.objects, make_editor(), compacted.manifest(-1).layers[0].state).count == 17


@pytest.mark.parametrize("what", ["snapshot", "manifest"])
def test_what_a_compaction_made_is_mended(compacted: Book, what: str) -> None:
    whole = compacted.damage(digest := compacted.name(4, what))
    assert summarise(compacted.replay()[0]) == [(4, what, "mendable")]
    compacted.replay(mend=True, solve=False)
    assert compacted.objects.get(digest) == whole


def test_after_a_loss_everything_can_be_compared_again_from_a_compaction_on(compacted: Book) -> None:
    compacted.steps[1] = compacted.steps[2] = compacted.steps[3] = None
    compacted.damage(compacted.name(4, "snapshot"), how="missing")
    replay, _ = compacted.replay()
    assert replay.unverified == [1, 2, 3, 7], "7 goes back to what is before it"
    assert summarise(replay) == [(4, "snapshot", "mendable")]


def test_a_compaction_of_other_edits_parts(compacted: Book) -> None:
    book = Book(make_editor())
    refs, others = book.add(12), book.add(1)
    book.withdraw(others)
    book.compact([*refs[1:], *others])
    assert summarise(book.replay()[0]) == [(4, "live list", "differs")]
    book.compact(refs[1:])
    assert (5, "live list", "differs") in summarise(book.replay(solve=False)[0]), "a missing pair is seen without solving"


@pytest.mark.parametrize("others", [2, 2 * FEW])
def test_after_an_erasure_the_recipe_holds_and_so_do_the_weights_without_the_edit(others: int) -> None:
    """The state is the pairs themselves, or their sums."""
    book = Book(make_editor(), every=2)
    book.add(others)
    refs = book.add(3)
    book.add(1)
    book.withdraw(refs[1:2])
    book.add(1)
    gone = {book.name(seq, "artifact"): None for seq in (2, 3)} | {book.name(2, "snapshot"): None}
    before = Pairs.from_bytes(book.objects.get(refs[0].pairs))
    erased = before.erase([1])
    assert Pairs.from_bytes(erased.to_bytes()).digest_rows() == before.digest_rows() and not erased.residuals[1].any()
    assert torch.equal(erased.take([0, 2]).residuals, before.take([0, 2]).residuals)
    gone[refs[0].pairs] = book.objects.put(erased.to_bytes())
    objects = tuple(Gone(digest=digest, by=by, what="test") for digest, by in gone.items())
    record = ErasureRecord(seq=6, ids=("2.1",), commits=(2, 3), reports=(), objects=objects, keys=())
    announce(book.storage, "", 6, book.objects.put(record.model_dump_json().encode()))
    for digest in gone:
        book.damage(digest, how="missing")

    replay, _ = book.replay(mend=True)
    assert summarise(replay) == [(2, "artifact", "erased"), (2, "snapshot", "erased"), (3, "artifact", "erased")]
    assert replay.recipe == book.manifest(5).recipe and (replay.unverified, replay.parted) == ([], False)
    assert sum(replay.compared.values()) == 4 and replay.worst <= 2e-7
    assert not any(book.objects.exists(digest) for digest, by in gone.items() if by is None), "a rebuild must not make it again"
