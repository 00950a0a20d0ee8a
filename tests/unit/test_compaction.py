"""Sums that are built anew: what thousands of additions and subtractions leave behind, and what does not depend on them."""

import json
import random
from collections.abc import Sequence

import pytest
import torch

from errata.candidates import build_candidate, load_state, restart_state, start_manifest
from errata.compaction import compact_state
from errata.editors import base
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.state import D4SState
from errata.edits import canonical_json, digest_of
from errata.errors import KeyMissingError
from errata.exactness import RELATIVE
from errata.manifests import Manifest, PairRef, StateRef, read_refs, sort_refs
from errata.modeling.layout import LAYOUTS
from errata.profiles import PrepareOptions, Profile, SolveOptions

BASE, PROFILE = "b" * 64, "c" * 64
WIDTH, OUT, LAYER = 48, 12, 1
PREPARE = PrepareOptions(layers=(LAYER,))


class Blobs(base.Blobs):
    """Objects in memory; counts what is read."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.read: list[str] = []

    def get(self, digest: str) -> bytes:
        self.read.append(digest)
        if digest not in self.data:
            raise KeyMissingError(digest)
        return self.data[digest]

    def put(self, data: bytes) -> str:
        self.data[digest_of(data)] = data
        return digest_of(data)


@pytest.fixture(scope="module")
def editor() -> D4S:
    torch.manual_seed(7)
    keys = torch.randn(200, WIDTH)
    moments = Moments(BASE, "corpus", 0, 200, {LAYER: keys.T @ keys / len(keys)})
    return D4S(
        Profile(base=BASE, prepare=PREPARE, solve=SolveOptions(lam=3.0, spread="single", moments="d" * 64)), moments, LAYOUTS["gpt2"]
    )


def make_pairs(count: int, first: int = 0) -> Pairs:
    torch.manual_seed(first)
    # Residuals and keys of very different sizes, so that large pairs round what small ones add.
    scale = 10.0 ** torch.randint(-3, 4, (count, 1))
    owners = tuple((f"edit-{first + row}",) for row in range(count))
    return Pairs(BASE, PREPARE.digest, owners, torch.randn(count, OUT) * scale, {LAYER: torch.randn(count, WIDTH)})


def store(blobs: Blobs, pairs: Pairs) -> list[PairRef]:
    digest = blobs.put(pairs.to_bytes())
    return [PairRef(pairs=digest, row=row) for row in range(len(pairs))]


def write(blobs: Blobs, editor: D4S, steps: Sequence[tuple[list[PairRef], list[PairRef]]], every: int = 10) -> Manifest:
    """The manifest after batches of (added, removed)."""
    manifest = start_manifest(editor, BASE, PROFILE)
    for add, remove in steps:
        manifest = build_candidate(blobs, editor, manifest, add, remove, every).manifest
    return manifest


def measure_drift(state: D4SState, wanted: D4SState) -> float:
    return max(
        float((found[LAYER] - other[LAYER]).norm() / other[LAYER].norm()) for found, other in ((state.rk, wanted.rk), (state.kk, wanted.kk))
    )


def test_thousands_of_operations_drift_little_and_a_compaction_forgets_them(editor: D4S) -> None:
    blobs, chance = Blobs(), random.Random(5)
    live: list[PairRef] = []
    state, operations = editor.empty_state(), 0
    for first in range(0, 3_000, 10):
        pairs = make_pairs(10, first)
        added = store(blobs, pairs)
        leaving = chance.sample(live, min(len(live), chance.choice((2, 9, 16))))
        removed = Pairs.concatenate([Pairs.from_bytes(blobs.data[ref.pairs]).take([ref.row]) for ref in leaving]) if leaving else None
        state = editor.merge(state, pairs, removed)
        live = [ref for ref in live if ref not in set(leaving)] + added
        operations += len(pairs) + len(leaving)
    assert operations > 5_000 and state.count == len(live) and state.pairs is None
    once = restart_state(blobs, editor, BASE, PROFILE, live).state
    assert 0 < measure_drift(state, once) < 1e-10, "it rounds, and little"
    head = start_manifest(editor, BASE, PROFILE)
    layer = head.layers[0].model_copy(update={"state": StateRef(snapshot=blobs.put(state.to_bytes()))})
    made = compact_state(blobs, editor, head.model_copy(update={"layers": (layer,)}), live)
    assert 0 < made.gap <= RELATIVE
    chance.shuffle(live)
    fresh = write(Blobs(), editor, [])
    again = compact_state(blobs, editor, write(blobs, editor, [(live, [])]), live)
    assert again.manifest == made.manifest, "the same edits, added at once, are the same bytes and the same recipe"
    assert made.manifest.layers[0].state.snapshot != digest_of(state.to_bytes())
    assert load_state(blobs, editor, made.manifest.layers[0].state).to_bytes() == once.to_bytes()
    assert made.manifest.recipe != fresh.recipe


def test_the_recipe_does_not_know_where_pairs_lie(editor: D4S) -> None:
    blobs, pairs = Blobs(), make_pairs(30)
    whole = store(blobs, pairs)
    parts = [ref for start in range(0, 30, 7) for ref in store(blobs, pairs.take(range(start, min(30, start + 7))))]
    first, second = (restart_state(blobs, editor, BASE, PROFILE, refs) for refs in (whole, parts))
    assert first.recipe == second.recipe
    assert measure_drift(first.state, second.state) < 1e-14


def test_each_object_is_read_once_and_a_shared_pair_counts_once(editor: D4S) -> None:
    blobs = Blobs()
    refs = [ref for first in range(0, 60, 5) for ref in store(blobs, make_pairs(5, first))]
    made = restart_state(blobs, editor, BASE, PROFILE, [*refs, *refs[10:20]])
    assert made.state.count == 60
    assert len(blobs.read) == len(set(blobs.read)) == 12


def test_blocks_bound_what_is_in_memory(editor: D4S, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, sizes = Blobs(), []
    refs = [ref for first in range(0, 60, 5) for ref in store(blobs, make_pairs(5, first))]
    whole = restart_state(blobs, editor, BASE, PROFILE, refs)
    monkeypatch.setattr("errata.candidates._BLOCK", 15)
    merge = D4S.merge
    monkeypatch.setattr(D4S, "merge", lambda self, state, add, remove: sizes.append(len(add)) or merge(self, state, add, remove))
    blocks = restart_state(blobs, editor, BASE, PROFILE, refs)
    assert sizes == [15] * 4
    assert blocks.recipe == whole.recipe and measure_drift(blocks.state, whole.state) < 1e-14


def test_few_pairs_are_kept_as_pairs_again(editor: D4S) -> None:
    blobs = Blobs()
    refs = [ref for first in range(0, 40, 10) for ref in store(blobs, make_pairs(10, first))]
    head = write(blobs, editor, [(refs, []), ([], refs[5:])], every=1)
    made = compact_state(blobs, editor, head, refs[:5])
    assert made.gap <= RELATIVE
    assert load_state(blobs, editor, head.layers[0].state).pairs is None
    assert (
        load_state(blobs, editor, made.manifest.layers[0].state).to_bytes()
        == editor.empty_state().add(make_pairs(10).take(range(5))).to_bytes()
    )


def test_without_live_edits_it_is_the_untouched_base(editor: D4S) -> None:
    blobs = Blobs()
    refs = store(blobs, make_pairs(20))
    made = compact_state(blobs, editor, write(blobs, editor, [(refs, []), ([], refs)]), [])
    assert (made.manifest, made.gap) == (start_manifest(editor, BASE, PROFILE), 0.0)


def test_other_edits_are_noticed(editor: D4S) -> None:
    blobs = Blobs()
    refs = store(blobs, make_pairs(20))
    head = write(blobs, editor, [(refs[:19], [])])
    assert compact_state(blobs, editor, head, refs).gap == float("inf")
    assert compact_state(blobs, editor, head, refs[1:]).gap > RELATIVE


def test_operations_are_counted_without_reading_history(editor: D4S) -> None:
    blobs = Blobs()
    refs = store(blobs, make_pairs(20))
    head = write(blobs, editor, [(refs[:10], []), (refs[10:], refs[:4]), ([], refs[5:6])], every=2)
    assert head.layers[0].state.operations == 25
    assert compact_state(blobs, editor, head, [*refs[4:5], *refs[6:]]).manifest.layers[0].state.operations == 0


def test_a_manifest_from_before_operations_were_counted_keeps_its_bytes(editor: D4S) -> None:
    old = start_manifest(editor, BASE, PROFILE).model_dump(mode="json")
    old["layers"][0]["state"] = {"snapshot": "e" * 64, "pairs_since": ["f" * 64]}
    data = canonical_json(old)
    assert Manifest.from_bytes(data).to_bytes() == data
    counted = json.loads(data)
    counted["layers"][0]["state"]["operations"] = 7
    assert Manifest.from_bytes(canonical_json(counted)).to_bytes() == canonical_json(counted)


def test_a_list_of_pairs_is_read_in_its_order() -> None:
    refs = [PairRef(pairs=name * 64, row=row) for name, row in (("b", 1), ("a", 2), ("a", 0), ("b", 1))]
    changes = canonical_json([{"op": "add", "pairs": ref.pairs, "rows": [ref.row]} for ref in refs])
    assert read_refs(changes) == refs
    assert sort_refs(refs) == [refs[2], refs[1], refs[0]]
