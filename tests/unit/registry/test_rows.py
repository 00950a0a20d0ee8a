"""Rows as they are stored: those from before risk was measured are read, and spelled, as they were."""

import pytest

from errata.edits import Edit, Risk, canonical_json
from errata.errors import FormatError
from registry.rows import BatchRow, read_rows

EDIT = Edit(id="case-1", subject="Anna", prompt="{} lives in", target_new="Paris")
OLD = (
    b'{"edit":{"id":"case-1","neighborhood_prompts":[],"paraphrase_prompts":[],"portability_prompts":[],"prompt":"{} lives in",'
    b'"subject":"Anna","target_new":"Paris"},"file":"' + b"a" * 64 + b'","line":1,"occurrence":"case-1@1","origin":"","position":0}'
)
"""A row that an Errata without risk has written."""


def make_row(risk: Risk | None = None) -> BatchRow:
    return BatchRow(position=0, occurrence="case-1@1", edit=EDIT, origin="", file="a" * 64, line=1, risk=risk)


def spell(row: BatchRow) -> bytes:
    return canonical_json(row.model_dump(mode="json", exclude_none=True))


def test_a_row_without_risk_is_spelled_as_ever_and_read() -> None:
    assert spell(make_row()) == OLD
    assert BatchRow.model_validate_json(OLD) == make_row()
    assert "risk" not in make_row().model_dump(), "an order, which spells every None, is no other either"


@pytest.mark.parametrize("risk", [Risk(perplexity=12.5, tokens=3), Risk(perplexity=None, tokens=1)])
def test_a_row_with_risk_comes_back(risk: Risk) -> None:
    row = make_row(risk)
    assert BatchRow.model_validate_json(spell(row)) == row
    assert spell(row) != OLD


@pytest.mark.parametrize(
    "risk", [{"perplexity": 0.5, "tokens": 1}, {"perplexity": 2.0, "tokens": 0}, {"perplexity": 2.0}, {"tokens": 1, "x": 1}]
)
def test_what_is_no_risk_is_refused(risk: dict[str, float]) -> None:
    row = make_row().model_dump(mode="json", exclude_none=True) | {"risk": risk}
    with pytest.raises(FormatError, match="risk"):
        read_rows(BatchRow, [row], "batch of commit 1")
