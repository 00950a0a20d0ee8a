"""Means, spreads, verdicts and the report, from cells made by hand."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from errata.comparison.cells import Cell, CellResult, EditRow, Point
from errata.comparison.drawing import draw_course
from errata.comparison.method import Recipe
from errata.comparison.orderings import CLAIMS, judge_claims
from errata.comparison.report import Heading, write_report
from errata.comparison.summary import Comparison, spell_spread

HEADING = Heading("A comparison", "errata bench", "a base", "some data", "A caveat.", ["a remark"])


def make_cell(method: str, seed: int, courses: dict[int, dict[str, float | None]], batch: int = 1, fault: str = "") -> CellResult:
    points = tuple(Point(edits=edits, live=edits, values=values, ages={"0-9": 1.0}) for edits, values in courses.items())
    rows = tuple(EditRow(edits=edits, edit="e", position=0, efficacy=1.0) for edits in courses)
    where = {"seconds": 1.0, "device": "cpu", "load": 0.5, "refused": {}}
    return CellResult(
        cell=Cell(method=method, batch=batch, seed=seed), fault=fault, written=max(courses), points=points, rows=rows, **where
    )


def compare(*cells: CellResult) -> Comparison:
    titles = {name: name.upper() for name in ("base", "d4s", "memit", "rome", "grace")}
    return Comparison(cells, titles, ["base"], {0: {"e": 3.0}})


def judge(comparison: Comparison, text: str) -> dict[int, bool]:
    (verdict,) = [item for item in judge_claims(comparison) if item.claim.text == text]
    return {seed: found.holds for seed, found in verdict.found.items()}


def test_a_mean_is_shown_with_least_and_most() -> None:
    assert spell_spread([0.5, 1.0], "efficacy") == ".750 (.500–1.000)"
    assert spell_spread([0.5], "efficacy") == ".500"
    assert spell_spread([-0.25], "efficacy") == "-.250"
    assert spell_spread([-0.0001], "efficacy") == ".000"
    assert spell_spread([], "efficacy") == "–"
    assert spell_spread([math.inf], "norm_ratio") == "∞"


def test_an_ordering_holds_stream_by_stream() -> None:
    cells = [
        *(make_cell("d4s", seed, {100: {"efficacy": 1.0}, 500: {"efficacy": 0.99}}) for seed in (0, 1)),
        make_cell("memit", 0, {100: {"efficacy": 1.0}, 500: {"efficacy": 0.4}}),
        make_cell("memit", 1, {100: {"efficacy": 0.9}, 500: {"efficacy": 0.995}}),
    ]
    comparison = compare(*cells)
    assert judge(comparison, "efficacy: MEMIT < D4S") == {0: True, 1: False}
    assert judge(comparison, "D4S keeps its efficacy from 100 edits to the last (− .05)") == {0: True, 1: True}
    assert judge(comparison, "MEMIT may lead after 100 edits, D4S after the last") == {0: True, 1: False}


def test_what_was_not_measured_is_not_judged() -> None:
    verdicts = judge_claims(compare(make_cell("d4s", 0, {100: {"efficacy": 1.0}})))
    assert all("GRACE" not in verdict.claim.text and "MEMIT" not in verdict.claim.text for verdict in verdicts)


def test_a_model_that_was_destroyed_has_lost_all() -> None:
    cells = (make_cell("d4s", 0, {100: {"efficacy": 1.0, "norm_ratio": 2.0}, 500: {"efficacy": 0.9, "norm_ratio": 2.5}}),)
    ended = make_cell("memit", 0, {100: {"efficacy": 0.8, "norm_ratio": 3.0}}, fault="after 312 edits: the model is destroyed")
    comparison = compare(*cells, ended)
    assert comparison.gather("memit", 1, None, "efficacy") == [0.0]
    assert comparison.gather("memit", 1, None, "norm_ratio") == [math.inf]
    assert comparison.gather("memit", 1, 100, "efficacy") == [0.8]
    assert comparison.gather("memit", 1, None, "portability") == [], "nobody was asked"
    assert judge(comparison, "norm: D4S < MEMIT") == {0: True}


def test_the_base_stands_in_every_table() -> None:
    comparison = compare(make_cell("base", 0, {100: {"ability": 0.9}}, batch=10), make_cell("d4s", 0, {100: {"ability": 0.88}}))
    assert comparison.gather("base", 1, 100, "ability") == [0.9]
    assert judge(comparison, "D4S leaves abilities as they were (− .05)") == {0: True}


def test_edits_are_told_apart_by_risk() -> None:
    result = make_cell("d4s", 0, {4: {"efficacy": 0.5}})
    rows = tuple(EditRow(edits=4, edit=name, position=place, efficacy=float(place < 2)) for place, name in enumerate("abcd"))
    comparison = Comparison([result.model_copy(update={"rows": rows})], {"d4s": "D4S"}, [], {0: {"a": 1.0, "b": 2.0, "c": 8.0, "d": 9.0}})
    assert [comparison.gather_risk("d4s", 1, quarter, "efficacy") for quarter in range(4)] == [[1.0], [1.0], [0.0], [0.0]]
    assert comparison.tabulate_edits().risk.tolist() == [1.0, 2.0, 8.0, 9.0]


def test_every_claim_is_asked_for_by_a_text_of_its_own() -> None:
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.otherwise and claim.source for claim in CLAIMS)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Comparison, Path]:
    cells = [
        make_cell(name, seed, {100: {"efficacy": (0.9, 0.95)[seed], "norm_ratio": 1.5, "generalization": 0.5}})
        for name in ("d4s", "memit")
        for seed in (0, 1)
    ]
    comparison = compare(*cells, make_cell("rome", 0, {10: {"efficacy": 0.1}}, fault="after 12 edits: the model is destroyed"))
    recipes = {name: Recipe(name, name.upper(), "a paper", lambda _: None, differs="a | bar") for name in ("d4s", "memit", "rome")}  # type: ignore[arg-type, return-value]
    write_report(comparison, recipes, HEADING, tmp_path)
    return comparison, tmp_path


def test_the_report_says_command_caveat_and_what_went_wrong(written: tuple[Comparison, Path]) -> None:
    text = (written[1] / "report.md").read_text()
    assert text.index("A caveat.") < text.index("`errata bench`") < text.index("## Batches of 1")
    assert "ROME, seed 0: ended after 12 edits: the model is destroyed" in text
    assert ".925 (.900–.950)" in text
    assert "a \\| bar" in text
    assert "a remark" in text


def test_equal_numbers_whose_mean_is_another_are_drawn(tmp_path: Path) -> None:
    odd = 0.1 + 0.2  # three times its third is not itself
    comparison = compare(*(make_cell("d4s", seed, {100: {"efficacy": odd, "norm_ratio": odd}}) for seed in range(3)))
    assert draw_course(comparison, 1, tmp_path / "course.png", "").exists()
    values = [0.882, 0.8820000000000001, 0.882]
    comparison = compare(*(make_cell("d4s", seed, {100: {"efficacy": value}}) for seed, value in enumerate(values)))
    assert draw_course(comparison, 1, tmp_path / "course.png", "").exists()


def test_the_page_holds_its_pictures(written: tuple[Comparison, Path]) -> None:
    page = (written[1] / "report.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<table>" in page


def test_raw_numbers_come_back(written: tuple[Comparison, Path]) -> None:
    comparison, folder = written
    points = pd.read_parquet(folder / "points.parquet")
    assert points.equals(comparison.tabulate_points())
    assert len(pd.read_csv(folder / "points.csv")) == len(points)
    found = points[(points.method == "d4s") & (points.seed == 1) & (points.measure == "efficacy")]
    assert found["value"].tolist() == [0.95]
    assert len(pd.read_parquet(folder / "edits.parquet")) == len(comparison.tabulate_edits())
