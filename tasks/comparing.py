"""A comparison of editing methods on one base: cell by cell, in processes side by side, each kept as soon as it is measured."""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from errata.builtin import NAMED
from errata.comparison.asking import Sheet
from errata.comparison.catalogue import RECIPES, list_once
from errata.comparison.cells import FULL, Cell, CellResult, Scope, list_cells, name_cell
from errata.comparison.material import Kind, Material, draw_edits, draw_world
from errata.comparison.method import Bench
from errata.comparison.running import run_cell
from errata.comparison.summary import Comparison
from errata.corpus import find_corpus
from errata.editors.d4s.moments import Moments
from errata.editors.rows import build_rows
from errata.edits import SLOT, Edit, Submission, canonical_json, digest_of
from errata.errors import InputError, TokenizationError
from errata.evaluation.risk import measure_risks
from errata.modeling.loading import Base
from errata.modeling.tokens import can_write
from errata.placing import write_whole
from errata.profiles import NeuronProfile, Profile, parse_profile
from errata.readers.files import read_edits
from errata.settings import Settings
from errata.world import make_world
from registry.calibrations import find_calibrated
from registry.release import resolve_tracking
from registry.shared import fetch_moments, get_profile
from registry.storage.base import open_storage
from registry.trials import TrialRuns
from tasks._progress import show_progress
from tasks._session import find_stored
from tasks.onboarding import place_base
from tasks.placing import Source, choose_corpus, place_profile

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a user wants compared."""

    base: str
    """As in `start_stream`."""
    methods: tuple[str, ...]
    edits: int
    batches: tuple[int, ...]
    """Ascending."""
    seeds: int
    revision: str | None = None
    data: Path | None = None
    """Edits; None: the built-in world's."""
    kind: Kind = "slots"
    """Of the built-in world's edits."""
    profile: str | None = None
    corpus: Path | None = None
    lam: float = 1.0
    judged: int = FULL.judged
    said: int = FULL.said
    jobs: int = 1
    afresh: bool = False


@dataclass(frozen=True)
class Order:
    """What a process needs to measure cells: names and digests, never a model."""

    settings: Settings
    scope: Scope
    folder: Path
    """Where cells are kept."""
    threads: int


@dataclass(frozen=True)
class Compared:
    """What was found."""

    comparison: Comparison
    scope: Scope
    materials: Mapping[int, Material]
    """By seed."""
    measured: int
    """Cells measured now; the others were there."""
    runs: TrialRuns
    """In MLflow."""


def compare_methods(settings: Settings, request: Request) -> Compared:
    """Measure every cell that was not measured before, and show all of them in MLflow.

    Raises:
        InputError: the data is no edits, or too few; the base has no profile, and nothing to measure one with.
        ModelError, StorageError, RegistryError: as elsewhere.
    """
    found = place_base(settings, request.base, request.revision)
    storage = open_storage(settings.root)
    calibrated = request.profile is None and find_calibrated(storage, found.ref.digest, "d4s") is not None
    stored = calibrated or request.corpus is None
    placed = place_profile(storage, settings.cache, found, "d4s", request.profile, None if stored else request.corpus)
    neurons = place_profile(storage, settings.cache, found, "ireva", None, None)
    materials = {seed: _draw_material(settings, found, request, seed) for seed in range(request.seeds)}
    scope = Scope(
        base=found.ref.digest,
        profile=placed.profile,
        neurons=neurons.profile,
        lam=request.lam,
        edits=request.edits,
        judged=request.judged,
        said=request.said,
    )
    folder = settings.cache / "comparisons" / digest_of(canonical_json(scope.model_dump(mode="json")))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for material in materials.values():
        write_whole(_material_path(folder, material.digest), material.model_dump_json().encode())
    cells = list(list_cells(request.methods, request.batches, range(request.seeds), list_once(request.batches)))
    paths = {cell: _cell_path(folder, scope, materials[cell.seed].digest, cell) for cell in cells}
    missing = [cell for cell in cells if request.afresh or not paths[cell].exists()]
    threads = settings.threads or max((os.cpu_count() or 1) // request.jobs, 1)
    order = Order(settings, scope, folder, threads)
    _measure_cells(order, missing, {seed: material.digest for seed, material in materials.items()}, request)
    risks = {seed: _measure_risks(settings, found.base, material) for seed, material in materials.items()}
    results = [CellResult.model_validate_json(paths[cell].read_bytes()) for cell in cells]
    comparison = Comparison(results, {name: recipe.title for name, recipe in RECIPES.items()}, list_once(request.batches), risks)
    return Compared(comparison, scope, materials, len(missing), _show_runs(settings, scope, results))


def attach_report(compared: Compared, files: Sequence[Path]) -> None:
    """Put the report into MLflow, beside the cells."""
    numbers = {"cells": len(compared.comparison.results), "measured_now": compared.measured}
    compared.runs.conclude(compared.scope.model_dump(), numbers, files)


def measure_cell(order: Order, cell: Cell, material: str, tell: Callable[[int], None]) -> None:
    """Measure one cell and keep it.

    Args:
        material: digest.
        tell: called with edits written.
    """
    torch.set_num_threads(order.threads)
    bench, sheet, edits = _open_bench(order, material, cell.seed)
    path = _cell_path(order.folder, order.scope, material, cell)
    work = path.with_suffix(".work")
    work.mkdir(exist_ok=True)
    result = run_cell(replace(bench, work=work), RECIPES[cell.method], edits, cell, sheet, tell)
    write_whole(path, result.model_dump_json().encode())
    shutil.rmtree(work, ignore_errors=True)


def _measure_cells(order: Order, cells: Sequence[Cell], materials: Mapping[int, str], request: Request) -> None:
    if not cells:
        return
    total = len(cells) * request.edits
    with show_progress(f"comparing, {len(cells)} cells") as on_progress:
        done = _Counter(total, on_progress)
        if request.jobs == 1:
            for cell in cells:
                measure_cell(order, cell, materials[cell.seed], done.add)
                _log.info("%s: measured", cell.title)
            return
        with _open_pool(request.jobs, done) as pool:
            waiting: dict[Future[None], Cell] = {pool.submit(_measure_elsewhere, order, cell, materials[cell.seed]): cell for cell in cells}
            for future in as_completed(waiting):
                future.result()
                _log.info("%s: measured", waiting[future].title)


class _Counter:
    """Adds up what is written, for a bar."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._total, self._on_progress, self._done = total, on_progress, 0

    def add(self, count: int) -> None:
        self._done += count
        self._on_progress(self._done, self._total)


@contextmanager
def _open_pool(jobs: int, done: _Counter) -> Iterator[ProcessPoolExecutor]:
    """Processes that tell what they write. An interruption ends them at once: what they were at is measured anew the next time."""
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[int | None] = context.SimpleQueue()

    def listen() -> None:
        while (count := told.get()) is not None:
            done.add(count)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_process, initargs=(told,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        told.put(None)
        listener.join()


_told: "SimpleQueue[int | None] | None" = None


def _begin_process(told: "SimpleQueue[int | None]") -> None:
    global _told  # a process has one queue from its beginning to its end
    _told = told
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever began this process ends it


def _measure_elsewhere(order: Order, cell: Cell, material: str) -> None:
    assert _told is not None, "set when the process began"
    measure_cell(order, cell, material, _told.put)


@lru_cache(maxsize=1)
def _open_bench(order: Order, material: str, seed: int) -> tuple[Bench, Sheet, tuple[Edit, ...]]:
    """What the cells of one seed share: a base, a stream, and what the base says to it."""
    settings, scope = order.settings, order.scope
    storage = open_storage(settings.root)
    base = find_stored(settings, storage, scope.base, settings.device)[2]
    torch.set_num_threads(order.threads)  # loading a base sets what the settings say
    profile, neurons = (parse_profile(get_profile(storage, scope.base, digest)) for digest in (scope.profile, scope.neurons))
    assert isinstance(profile, Profile) and isinstance(neurons, NeuronProfile), "each was placed for its editor"
    moments = Moments.load(fetch_moments(storage, profile.solve.moments, settings.cache))
    profile = profile.model_copy(update={"solve": profile.solve.model_copy(update={"lam": profile.solve.lam * scope.lam})})
    given = Material.model_validate_json(_material_path(order.folder, material).read_bytes())
    sheet = Sheet(base, given, scope, seed, settings.evaluate.batch_tokens)
    bench = Bench(base, profile, moments, neurons, given.pool, order.folder, seed, settings.evaluate.batch_tokens)
    return bench, sheet, given.edits


def _draw_material(settings: Settings, found: Source, request: Request, seed: int) -> Material:
    if request.data is None:
        own = NAMED.get(request.base)
        if own is None:
            raise InputError(f"data: expected edits for {request.base!r} (--data FILE), found none; only the built-in bases have a world")
        return draw_world(make_world(own.world), request.edits, seed, request.kind)
    edits, refused = _read_data(request.data)
    corpus = find_corpus(choose_corpus(found, request.corpus), settings.cache)
    if refused and seed == 0:
        _log.warning("%s: %d records are no edits; `errata check` names them", request.data, refused)
    return draw_edits(edits, request.edits, seed, corpus.read(seed=seed), str(request.data), lambda edit: _fits(found.base, edit))


@lru_cache(maxsize=1)
def _read_data(path: Path) -> tuple[list[Edit], int]:
    records = list(read_edits(path))
    edits = [record.edit for record in records if isinstance(record, Submission)]
    return edits, len(records) - len(edits)


def _fits(base: Base, edit: Edit) -> bool:
    """Whether this base can be asked about an edit: its words can be written, and its prompt leaves room for contexts and an answer."""
    try:
        build_rows(base.tokenizer, edit, (SLOT,), base.context // 2)
    except TokenizationError:
        return False
    return edit.target_true is None or can_write(base.tokenizer, edit.target_true)


def _measure_risks(settings: Settings, base: Base, material: Material) -> dict[str, float]:
    """Edit id → risk under the base."""
    measured = measure_risks(base, material.edits, batch_tokens=settings.evaluate.batch_tokens)
    return {name: risk.figure for name, risk in measured.items()}


def _show_runs(settings: Settings, scope: Scope, results: Sequence[CellResult]) -> TrialRuns:
    where = resolve_tracking(settings.mlflow.tracking_uri, settings.root)
    runs = TrialRuns(*where, scope.base, digest_of(canonical_json(scope.model_dump(mode="json"))), "comparisons")
    for result in results:
        cell = result.cell
        course = {point.edits: {name: value for name, value in point.values.items() if value is not None} for point in result.points}
        told = {**cell.model_dump(), "fault": result.fault, "written": result.written, "device": result.device, "load": result.load}
        trial = digest_of(canonical_json([cell.model_dump(mode="json"), result.seconds]))[:24]
        runs.record_trial(cell.title, trial, told, {}, course)
    return runs


def _material_path(folder: Path, digest: str) -> Path:
    return folder / f"material-{digest[:24]}.json"


def _cell_path(folder: Path, scope: Scope, material: str, cell: Cell) -> Path:
    return folder / f"cell-{name_cell(scope, material, cell)}.json"
