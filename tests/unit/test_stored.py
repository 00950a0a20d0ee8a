"""What is too large for memory: read and written layer by layer, with the same bytes and weights to the bit, in about one layer's room."""

import gc
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.candidates import build_candidate, load_artifacts, load_state, restart_state, start_manifest, store_restart
from errata.editors.artifacts import pack_tensors
from errata.editors.base import Pairs
from errata.editors.d4s import state as states
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.state import D4SState
from errata.editors.stored import Lazy, write_doubles
from errata.edits import digest_of, digest_written
from errata.errors import FormatError, KeyMissingError, ObjectCorruptError
from errata.manifests import Manifest, PairRef
from errata.modeling.layout import ModelLayout
from errata.profiles import PrepareOptions, Profile, SolveOptions
from registry import objects
from registry.objects import ObjectStore, drop_stale
from registry.storage.base import Storage
from registry.storage.local import LocalStorage
from registry.storage.memory import MemoryStorage

BASE, LAYERS, D_OUT, D_IN = "b" * 64, (2, 3, 10), 6, 16
PREPARE = PrepareOptions(layers=LAYERS)
LAYOUT = cast(ModelLayout, SimpleNamespace(weight_name=lambda layer: f"layer.{layer}"))


def make_pairs(count: int, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    keys = {layer: torch.randn(count, D_IN, generator=generator) for layer in LAYERS}
    owners = tuple((f"{seed}-{row}",) for row in range(count))
    return Pairs(BASE, PREPARE.digest, owners, torch.randn(count, D_OUT, generator=generator), keys)


def make_moments() -> Moments:
    keys = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(7))
    return Moments(BASE, "corpus", 0, 200, {layer: (layer + 1) * keys.T @ keys / 200 for layer in LAYERS})


def make_editor(spread: str = "even", moments: Moments | None = None, **limits: Any) -> D4S:
    solve = SolveOptions(lam=3.0, spread=spread, moments="m" * 64)  # type: ignore[arg-type]
    return D4S(Profile(base=BASE, prepare=PREPARE, solve=solve), moments or make_moments(), LAYOUT, **limits)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as too large for memory."""
    monkeypatch.setattr(states, "HELD", 0)
    monkeypatch.setattr(objects, "_LARGE", 1)


@pytest.fixture(params=["local", "elsewhere"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "root") if request.param == "local" else MemoryStorage()


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None)
@given(st.dictionaries(names, shapes, max_size=5), st.dictionaries(names, names | st.integers(), max_size=3))
def test_the_bytes_are_the_library_s(sizes: dict[str, tuple[int, int]], metadata: dict[str, Any]) -> None:
    sizes = {name: shape for name, shape in sizes.items() if name != "__metadata__"}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in sizes.items()}
    with io.BytesIO() as file:
        write_doubles(file, "kind", 1, [(name, tensor.shape, lambda made=tensor: made) for name, tensor in tensors.items()], metadata)
        assert file.getvalue() == pack_tensors("kind", 1, tensors, metadata)


@pytest.mark.parametrize("crossed", [False, True])
def test_states_are_stored_with_the_same_bytes_however_they_are_held(large: None, tmp_path: Path, crossed: bool) -> None:
    lazily = D4SState.empty(BASE, PREPARE.digest).add(make_pairs(30), crossed).remove(make_pairs(30).take(range(9)))
    assert isinstance(lazily.kk, Lazy) and lazily.waiting
    states.HELD = 2**28  # the fixture puts it back
    held = D4SState.empty(BASE, PREPARE.digest).add(make_pairs(30), crossed).remove(make_pairs(30).take(range(9)))
    assert not isinstance(held.kk, Lazy)
    data = held.to_bytes()
    assert lazily.to_bytes() == data and digest_written(lazily.write) == digest_of(data)
    (tmp_path / "state").write_bytes(data)
    mapped, read = D4SState.load(tmp_path / "state"), D4SState.load(data)
    assert isinstance(mapped.kk, Lazy) and not isinstance(read.kk, Lazy)
    for ours, theirs in ((mapped.rk, read.rk), (mapped.kk, read.kk), (mapped.kx, read.kx), (lazily.kk, held.kk), (lazily.kx, held.kx)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)  # type: ignore[index, call-overload]


@pytest.mark.parametrize("spread", ["even", "refresh"])
def test_a_stream_has_the_same_weights_to_the_bit_layer_by_layer(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: str
) -> None:
    """Batches, a snapshot, a removal, and a restart, all held in memory and then nothing of it."""

    def run(store: ObjectStore, editor: D4S) -> list[Manifest]:
        refs = []
        for seed in range(6):
            stored = store.put(make_pairs(8, seed).to_bytes())
            refs.append([PairRef(pairs=stored, row=row) for row in range(8)])
        made = [start_manifest(editor, BASE, "p" * 64)]
        for add, remove in ((refs[0], []), (refs[1] + refs[2], []), (refs[3], refs[1]), ([], refs[0][:3]), (refs[4], []), (refs[5], [])):
            made.append(build_candidate(store, editor, made[-1], add, remove, snapshot_every=3).manifest)
        live = refs[0][3:] + refs[2] + refs[3] + refs[4] + refs[5]
        restarted = restart_state(store, editor, BASE, "p" * 64, live)
        made.append(store_restart(store, editor, BASE, "p" * 64, restarted))
        return made

    held_store = ObjectStore(MemoryStorage(), "objects")
    held = run(held_store, make_editor(spread))
    monkeypatch.setattr(states, "HELD", 0)
    monkeypatch.setattr(objects, "_LARGE", 1)
    store = ObjectStore(storage, "objects", tmp_path / "shelf")
    moments = store.put(make_moments().to_bytes())
    mapped = Moments.load(store.fetch(moments))
    assert isinstance(mapped.c, Lazy)
    editor = make_editor(spread, mapped, scratch=tmp_path / "scratch", hoards=False)
    assert [manifest.digest for manifest in run(store, editor)] == [manifest.digest for manifest in held]
    (artifact,) = load_artifacts(store, held[-1])
    assert set(artifact.deltas) == {f"layer.{layer}" for layer in LAYERS}
    state = load_state(store, editor, held[3].layers[0].state)
    assert isinstance(state.kk, Lazy)
    wanted = make_editor(spread).measure_fits(load_state(held_store, make_editor(spread), held[3].layers[0].state), make_pairs(4, 3))
    assert torch.equal(editor.measure_fits(state, make_pairs(4, 3)), wanted)


def test_pairs_that_wait_are_summed_into_a_file_that_goes_with_the_state(large: None, tmp_path: Path) -> None:
    editor, scratch = make_editor(scratch=tmp_path / "scratch"), tmp_path / "scratch"
    layer_bytes = 8 * (D_OUT + D_IN) * D_IN
    state, most = editor.empty_state(), 0
    for seed in range(20):
        state = editor.merge(state, make_pairs(10, seed), None)
        most = max(most, state.waiting)
        assert len(list(scratch.glob("*"))) <= 1, "what was summed before is gone"
    assert list(scratch.glob("*")) and 0 < most < layer_bytes
    states.HELD = 2**28
    wanted = editor.empty_state()
    for seed in range(20):
        wanted = editor.merge(wanted, make_pairs(10, seed), None)
    assert all(torch.equal(state.kk[layer], wanted.kk[layer]) and torch.equal(state.rk[layer], wanted.rk[layer]) for layer in LAYERS)
    del state
    gc.collect()
    assert not list(scratch.glob("*"))


def test_an_editor_of_little_room_keeps_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = states.torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda system: made.append(len(system)) or real(system))
    solved = []
    for hoards in (True, False):
        editor, before = make_editor(hoards=hoards), len(made)
        state = editor.merge(editor.empty_state(), make_pairs(30), None)
        for _ in range(2):
            artifact = editor.solve(state)
        assert artifact is not None
        solved.append(artifact.to_bytes())
        assert len(made) - before == (3 if hoards else 6)
    assert solved[0] == solved[1]


def test_a_large_object_is_a_file_that_was_checked(large: None, storage: Storage, tmp_path: Path) -> None:
    store = ObjectStore(storage, "objects", tmp_path / "shelf")
    digest = store.put_from(lambda file: (file.write(b"some "), file.write(b"bytes")))
    assert digest == digest_of(b"some bytes") == store.put_from(lambda file: file.write(b"some bytes")), "once more is no fault"
    for _ in range(2):
        place = store.fetch(digest)
        assert isinstance(place, Path) and place.read_bytes() == b"some bytes" == store.get(digest)
    assert ObjectStore(storage, "objects").fetch(digest) == b"some bytes", "without a shelf"
    with pytest.raises(KeyMissingError):
        store.fetch("0" * 64)


def test_a_damaged_large_object_is_told_and_replaced(large: None, storage: Storage, tmp_path: Path) -> None:
    store, digest = ObjectStore(storage, "objects", tmp_path / "shelf"), digest_of(b"some bytes")
    storage.create(f"objects/{digest}", b"other bytes")
    with pytest.raises(ObjectCorruptError, match="expected bytes with this sha256"):
        store.fetch(digest)
    assert not [path for path in (tmp_path / "shelf").glob("*") if path.is_file()]
    store.put_from(lambda file: file.write(b"some bytes"))
    assert store.get(digest) == b"some bytes"


def test_local_copies_that_nobody_uses_go(large: None, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    store = ObjectStore(MemoryStorage(), "objects", shelf)
    old, used, new = (store.put(text) for text in (b"old one", b"used one", b"new one"))
    for digest in (old, used):
        place = store.fetch(digest)
        assert isinstance(place, Path)
        os.utime(place, (0, 0))
    store.fetch(used)
    store.fetch(new)
    assert {path.name for path in shelf.iterdir()} == {used, new}
    (tmp_path / "scratch" / "errata-dead").mkdir(parents=True)
    os.utime(tmp_path / "scratch" / "errata-dead", (0, 0))
    drop_stale(tmp_path / "scratch")
    drop_stale(tmp_path / "never made")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0no json!", make_moments().to_bytes()[:-8]])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(FormatError):
        D4SState.load(tmp_path / "state")
    with pytest.raises(FormatError):
        Moments.load(tmp_path / "state")


MEASURED = """
    import sys
    from hashlib import sha256
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    sys.path.insert(0, sys.argv[1])
    from errata.editors.base import Pairs
    from errata.editors.d4s import state as states
    from errata.editors.d4s.editor import D4S
    from errata.editors.d4s.moments import Moments
    from errata.profiles import PrepareOptions, Profile, SolveOptions
    from registry import objects
    from registry.objects import ObjectStore
    from registry.storage.local import LocalStorage

    torch.set_num_threads(1)
    states._FEW = 1_000  # sums from the beginning, since many pairs would be what is measured
    folder, count, width, holds = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "holds"
    if not holds:
        states.HELD, objects._LARGE = 0, 1
    layers, base = tuple(range(count)), "b" * 64
    prepare = PrepareOptions(layers=layers)
    store = ObjectStore(LocalStorage(folder), "objects", folder / "shelf")

    def run():
        c = Moments.load(store.fetch((folder / "moments").read_text()))
        profile = Profile(base=base, prepare=prepare, solve=SolveOptions(lam=1.0, spread="even", moments="m"))
        layout = SimpleNamespace(weight_name=lambda layer: f"h.{layer}")
        editor = D4S(profile, c, layout, scratch=folder / "scratch", hoards=holds)
        state = editor.empty_state()
        for seed in range(3):
            rows = 20
            keys = {layer: torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) for layer in layers}
            owners = tuple((f"{seed}-{row}",) for row in range(rows))
            state = editor.merge(state, Pairs(base, prepare.digest, owners, torch.ones(rows, 16), keys), None)
        digest = store.put_from(state.write)
        again = editor.merge(editor.load_state(store.fetch(digest)), None, None)
        editor.measure_fits(again, Pairs(base, prepare.digest, (("x",),), torch.ones(1, 16), {layer: keys[layer][:1] for layer in layers}))
        return digest, editor.solve(again).to_bytes()

    digest, data = run()
    peak = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["VmHWM"]
    print(int(peak.split()[0]) / 1024, digest, sha256(data).hexdigest())
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_about_one_layer_s_share(tmp_path: Path) -> None:
    """Merging, solving, storing, loading and solving again, in processes of their own: with eight layers as with two."""
    width = 1_024

    def measure(count: int, mode: str) -> Sequence[str]:
        folder = tmp_path / f"{count}"
        moments = Moments(BASE, "corpus", 0, 1, {layer: torch.eye(width) for layer in range(count)})
        digest = ObjectStore(LocalStorage(folder), "objects").put(moments.to_bytes())
        (folder / "moments").write_text(digest)
        words = (str(Path(__file__).parents[2]), str(folder), str(count), str(width), mode)
        command = [sys.executable, "-c", textwrap.dedent(MEASURED), *words]
        # Without this, glibc keeps freed blocks of such a size for later: what is measured then is how they are scattered.
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
        return done.stdout.split()

    few, many, held = measure(2, "offloads"), measure(8, "offloads"), measure(8, "holds")
    layer = 8 * (width + 16) * width / 2**20
    assert float(many[0]) - float(few[0]) < layer, "six layers more"
    assert float(held[0]) - float(many[0]) > 6 * layer, "what it takes to hold them"
    assert many[1:] == held[1:], "the same state and the same weights, to the bit"
