"""One cell: batches, stops, what ends it; and which cells there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_base import build_edit, choose_options
from errata.comparison.asking import Sheet
from errata.comparison.catalogue import BASE
from errata.comparison.cells import Cell, CellResult, Scope, list_cells, list_stops, name_age, name_cell
from errata.comparison.material import Material
from errata.comparison.method import Bench, Recipe, UnsuitedError
from errata.comparison.running import run_cell
from errata.comparison.summary import Comparison
from errata.editors.d4s.moments import collect_moments
from errata.edits import Edit
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.patch import Attachable
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, Profile, SolveOptions

EDITS = tuple(build_edit(person, answer=person) for person in range(7))


class Recorder:
    """Remembers how it was called, and fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.built = 0
        self.refused: dict[str, str] = {}
        self._fails_at = fails_at

    def write(self, edits: Sequence[Edit]) -> None:
        if self._fails_at is not None and sum(self.batches) + len(edits) > self._fails_at:
            raise EditorError("the model is destroyed")
        self.batches.append(len(edits))
        if len(self.batches) == 1:
            self.refused[edits[0].edit_id] = "no room"

    def build_artifacts(self) -> Sequence[Attachable]:
        self.built += 1
        return ()

    def count_bytes(self) -> int:
        return 17


@pytest.fixture(scope="module")
def bench(small_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    options = choose_options()
    moments = collect_moments(small_base, options.layers, ["The home of Ann is Paris."])
    profile = Profile(base=small_base.digest, prepare=options, solve=SolveOptions(lam=1.0, spread="single", moments=""))
    neurons = NeuronProfile(base=small_base.digest, prepare=NeuronOptions(layer=2), solve=GateOptions())
    work: Path = tmp_path_factory.mktemp("work")
    return Bench(small_base, profile, moments, neurons, (), work, 0, 512)


@pytest.fixture(scope="module")
def sheet(small_base: Base) -> Sheet:
    material = Material(source="test", edits=EDITS, pool=(), texts=(), questions=())
    scope = Scope(base="", profile="", neurons="", edits=len(EDITS), judged=2, said=1)
    return Sheet(small_base, material, scope, 0, 512)


def run(bench: Bench, sheet: Sheet, method: Recorder, batch: int = 3, **fields: Any) -> tuple[CellResult, list[int]]:
    told: list[int] = []
    recipe = Recipe("recorder", "recorder", "", lambda _: method, **fields)
    return run_cell(bench, recipe, EDITS, Cell(method="recorder", batch=batch, seed=0), sheet, told.append), told


def test_batches_are_written_in_order_and_measured_at_the_stops(bench: Bench, sheet: Sheet) -> None:
    method = Recorder()
    result, told = run(bench, sheet, method)
    assert method.batches == [3, 3, 1]
    assert told == [3, 3, 1]
    assert [point.edits for point in result.points] == [3, 7]
    assert result.fault == "" and result.written == 7
    assert result.refused == {EDITS[0].edit_id: "no room"}
    assert result.points[-1].values["state_bytes"] == 17
    assert result.points[-1].values["write_seconds"] >= 0
    assert CellResult.model_validate_json(result.model_dump_json()) == result


def test_a_slow_method_is_measured_at_the_end_alone(bench: Bench, sheet: Sheet) -> None:
    method = Recorder()
    result, _ = run(bench, sheet, method, final_only=True)
    assert method.built == 1
    assert [point.edits for point in result.points] == [7]


def test_what_ends_a_method_is_a_result(bench: Bench, sheet: Sheet) -> None:
    result, told = run(bench, sheet, Recorder(fails_at=4))
    assert result.fault == "after 3 edits: the model is destroyed"
    assert result.written == 3
    assert [point.edits for point in result.points] == [3]
    assert sum(told) == len(EDITS), "the bar ends where it would have"


def test_what_a_base_is_not_fit_for_is_no_result(bench: Bench, sheet: Sheet) -> None:
    class Unsuited(Recorder):
        def build_artifacts(self) -> Sequence[Attachable]:
            raise UnsuitedError("this base does not read")

    result, _ = run(bench, sheet, Unsuited())
    assert result.unsuited and result.fault == "after 3 edits: this base does not read"
    comparison = Comparison([result], {"recorder": "recorder"}, [], {})
    assert comparison.gather("recorder", 3, None, "efficacy") == []


def test_the_base_is_a_method_that_writes_nothing(bench: Bench, sheet: Sheet) -> None:
    result = run_cell(bench, BASE, EDITS, Cell(method="base", batch=7, seed=0), sheet, lambda _: None)
    assert result.points[-1].values["specificity"] in (1, None)
    assert result.points[-1].values["state_bytes"] == 0


def test_stops_lie_at_ends_of_batches() -> None:
    assert list_stops(1_000, 1) == [1, 10, 100, 500, 1_000]
    assert list_stops(1_200, 100) == [100, 500, 1_000, 1_200]
    assert list_stops(25, 10) == [10, 25]
    assert list_stops(2, 1) == [1, 2]


def test_ages() -> None:
    assert [name_age(age) for age in (0, 9, 10, 99, 100, 499, 500, 5_000)] == ["0-9"] * 2 + ["10-99"] * 2 + ["100-499"] * 2 + ["500-on"] * 2


def test_cells_go_seed_by_seed_and_some_methods_are_measured_once() -> None:
    cells = list(list_cells(["base", "d4s"], [1, 10], [0, 1], {"base": 10}))
    assert [(cell.seed, cell.method, cell.batch) for cell in cells] == [
        (0, "base", 10), (0, "d4s", 1), (0, "d4s", 10), (1, "base", 10), (1, "d4s", 1), (1, "d4s", 10),
    ]  # fmt: skip


def test_a_cell_is_named_by_all_that_decides_what_is_measured() -> None:
    scope = Scope(base="b", profile="p", neurons="n", edits=10, judged=2, said=1)
    cell = Cell(method="d4s", batch=1, seed=0)
    names = {
        name_cell(scope, "m", cell),
        name_cell(scope, "other", cell),
        name_cell(scope.model_copy(update={"lam": 2.0}), "m", cell),
        name_cell(scope, "m", cell.model_copy(update={"batch": 2})),
    }
    assert len(names) == 4
    assert name_cell(scope, "m", cell) in names
