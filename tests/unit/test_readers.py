"""Files of edits: every form is recognised, and every wrong input has its outcome and its message."""

import gc
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit, Refusal, Submission, canonical_json, spell_submission
from errata.errors import InputError
from errata.readers.files import read_edits, read_lines
from errata.readers.foreign import open_slot

SHARED = Path(os.environ.get("ERRATA_TEST_SHARED") or Path(__file__).resolve().parents[3] / "shared")
OURS = {"subject": "Ada", "prompt": "{} lives in", "target_new": "Rome"}
REWRITE = {
    "prompt": "The mother tongue of {} is",
    "relation_id": "P103",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
    "subject": "Danielle Darrieux",
}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
FLAT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "Michel Rocard is a native speaker of",
}
ENRICHED = {
    "case_id": 7,
    "relation_id": "P103",
    "subject": "Danielle Darrieux",
    "prompt": "The mother tongue of {} is",
    "target_new": "English",
    "target_true": "French",
    "paraphrase_prompts": [],
    "cf_rephrase_prompt": "Danielle Darrieux, a native",
    "cf_locality_prompt": "Michel Rocard is a native speaker of",
    "neighborhood_prompts": [],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
}
KNOWEDIT = {
    "subject": "Epaspidoceras",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epaspidoceras belong to?",
    "ground_truth": ["Aspidoceratidae"],
    "rephrase_prompt": "What family are Epaspidoceras?",
    "locality": {"Relation_Specificity": [{"prompt": "The rank of Epaspidoceras is", "ground_truth": [["genus", "kind"], ["genus"]]}]},
    "portability": {"Reasoning": [{"prompt": "Epaspidoceras are commonly called", "ground_truth": "Owlet moths"}], "Subject_Aliasing": []},
}


def read(*records: Any) -> list[Submission | Refusal]:
    data = b"\n".join(record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)
    return list(read_edits(io.BytesIO(data), "f.jsonl"))


def read_one(record: Any) -> Submission:
    (result,) = read(record)
    assert isinstance(result, Submission), result
    return result


def refuse_one(record: Any) -> Refusal:
    (result,) = read(record)
    assert isinstance(result, Refusal), result
    return result


# Forms


@pytest.mark.parametrize(("record", "relation"), [(COUNTERFACT, "P103"), (FLAT, None), (ENRICHED, "P103")])
def test_counterfact_is_the_same_in_every_form(record: dict[str, Any], relation: str | None) -> None:
    edit = read_one(record).edit
    assert (edit.subject, edit.prompt, edit.relation_id) == ("Danielle Darrieux", "The mother tongue of {} is", relation)
    assert (edit.target_new, edit.target_true) == ("English", "French")
    assert edit.paraphrase_prompts == ("Danielle Darrieux, a native",)
    assert [(p.prompt, p.answers, p.kind) for p in edit.neighborhood_prompts] == [
        ("Michel Rocard is a native speaker of", ("French",), "neighborhood")
    ]
    assert edit.id is None
    assert edit.note == "case_id 7"
    assert edit.source is not None
    assert edit.source.startswith("CounterFact")


def test_zsre_writes_alt() -> None:
    edit = read_one(ZSRE).edit
    assert (edit.prompt, edit.rewrite_prompt) == ("What university did {} attend?", ZSRE["src"])
    assert (edit.target_new, edit.target_true) == ("University of Michigan", "Illinois Institute of Technology")
    assert edit.paraphrase_prompts == (ZSRE["rephrase"],)
    assert [(p.prompt, p.answers) for p in edit.neighborhood_prompts] == [(ZSRE["loc"], ("Hugo Weaving",))]


def test_knowedit_keeps_locality_and_portability_apart() -> None:
    edit = read_one(KNOWEDIT).edit
    assert (edit.prompt, edit.target_true) == ("Which family does {} belong to?", "Aspidoceratidae")
    assert [(p.prompt, p.answers, p.kind) for p in edit.neighborhood_prompts] == [
        ("The rank of Epaspidoceras is", ("genus", "kind"), "neighborhood")
    ]
    assert [(p.prompt, p.answers, p.kind) for p in edit.portability_prompts] == [
        ("Epaspidoceras are commonly called", ("Owlet moths",), "portability")
    ]


def test_a_row_of_ours_may_insist_and_name_its_origin() -> None:
    submission = read_one({**OURS, "id": "x-1", "again": True, "force": True, "origin": "facts.json[3]"})
    assert (submission.again, submission.force, submission.origin, submission.edit.edit_id) == (True, True, "facts.json[3]", "x-1")


def test_foreign_records_cannot_insist() -> None:
    submission = read_one({**FLAT, "again": True, "origin": "elsewhere"})
    assert (submission.again, submission.origin) == (False, "f.jsonl:1")


# Written-out prompts


@pytest.mark.parametrize(
    ("prompt", "subject", "opened"),
    [
        ("Ada lives in", "Ada", "{} lives in"),
        ("Does Ada know Ada?", "Ada", "Does {} know Ada?"),
        ("Is canada near Ada?", "Ada", "Is canada near {}?"),
        ("where is ADA now", "Ada", "where is {} now"),
        ("In der Straße 5 wohnt", "STRASSE 5", "In der {} wohnt"),
        ("Zoe\u0308 lives in", "Zoë", "{} lives in"),
        ("What is Angora goat named after?", "Angora goat ", "What is {} named after?"),
    ],
)
def test_the_subjects_first_occurrence_becomes_the_slot(prompt: str, subject: str, opened: str) -> None:
    assert open_slot(prompt, subject) == opened
    assert read_one({**FLAT, "prompt": prompt, "subject": subject}).edit.prompt == opened


def test_a_subject_that_is_not_in_its_prompt_is_refused() -> None:
    assert refuse_one({**ZSRE, "subject": "Ada"}) == Refusal(
        origin="f.jsonl:1",
        field="src",
        reason="expected the subject 'Ada' in the prompt, found 'What university did Watts Humphrey attend?'",
    )


# Wrong records: each costs nothing but itself


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ({**OURS, "target_new": ""}, "target_new", "expected some text, found an empty string"),
        ({**OURS, "target_new": " \n"}, "target_new", "expected some text, found an empty string"),
        ({**OURS, "target_new": "x" * 1_000_000}, "target_new", "expected at most 4000 characters, found 1000000"),
        ({**OURS, "note": "x" * 5_000}, "note", "(5000 characters)"),
        ({**OURS, "prompt": "Ada lives in"}, "prompt", "expected exactly one '{}' where the subject stands, found 0 in 'Ada lives in'"),
        ({**OURS, "prompt": "{} and {}"}, "prompt", "expected exactly one '{}' where the subject stands, found 2 in '{} and {}'"),
        ({**OURS, "subject": 5}, "subject", "expected text, found 5"),
        ({**OURS, "subject": None}, "subject", "expected text, found null"),
        ({**OURS, "subject": "\ud800"}, "subject", "expected Unicode text, found the lone surrogate \\ud800"),
        ({"subject": "Ada", "prompt": "{} lives in"}, "target_new", "expected a value, found none"),
        (
            {"subject": "Ada", "prompt": "{} lives in", "targetnew": "x"},
            "targetnew",
            "unknown field 'targetnew'; did you mean 'target_new'?",
        ),
        ({**OURS, "colour": "red"}, "colour", "unknown field 'colour'; expected one of again, aliases, force, id"),
        ({**OURS, "id": "a b"}, "id", "expected a name without white space"),
        ({**OURS, "id": "x" * 201}, "id", "expected 1 to 200 characters, found 201"),
        (
            {**OURS, "submitted_at": "2026-01-01"},
            "submitted_at",
            "expected a time with its zone, such as 2026-01-31T12:00:00Z, found '2026-01-01'",
        ),
        ({**OURS, "submitted_at": "soon"}, "submitted_at", "expected a time such as 2026-01-31T12:00:00Z, found 'soon'"),
        ({**OURS, "again": "perhaps"}, "again", "expected true or false, found 'perhaps'"),
        ({**OURS, "paraphrase_prompts": "x"}, "paraphrase_prompts", "expected a list, found 'x'"),
        ({**OURS, "paraphrase_prompts": ["x", 3]}, "paraphrase_prompts[1]", "expected text, found 3"),
        ({**OURS, "paraphrase_prompts": ["Is {} there"]}, "paraphrase_prompts[0]", "expected full text"),
        ({**OURS, "neighborhood_prompts": ["x", {"prompt": "Is {} there"}]}, "neighborhood_prompts[1].prompt", "expected full text"),
        ({**OURS, "neighborhood_prompts": [{"prompt": "x", "answer": "y"}]}, "neighborhood_prompts[0].answer", "unknown field 'answer'"),
        ({**OURS, "portability_prompts": [5]}, "portability_prompts[0]", "expected an object, found 5"),
        ({"requested_rewrite": "x"}, "requested_rewrite", "expected an object, found 'x'"),
        ({"requested_rewrite": {**REWRITE, "target_new": {"str": ""}}}, "requested_rewrite.target_new", "found an empty string"),
        ({**ZSRE, "alt": ""}, "alt", "expected some text, found an empty string"),
        ({**FLAT, "subject": ""}, "subject", "expected some text, found an empty string"),
        ({**KNOWEDIT, "locality": 5}, "locality", "expected an object of lists, found 5"),
        (
            {**KNOWEDIT, "portability": {"Reasoning": ["x"]}},
            "portability.Reasoning[0]",
            "expected an object with prompt and ground_truth, found 'x'",
        ),
        ([OURS], None, "expected an object with the fields of an edit, found a list of 1"),
        ("x", None, "expected an object with the fields of an edit, found 'x'"),
        (
            b'{"subject": "Ada", "subject": "Bo", "prompt": "{} x", "target_new": "y"}',
            None,
            "expected each field once, found 'subject' twice",
        ),
        (b'{"subject": "Ada"', None, "expected JSON, found the end of the line at column 18"),
        (b'{"subject": "\xff"}', None, "expected UTF-8, found byte 0xff at column 14"),
    ],
)
def test_a_wrong_record_is_refused_and_the_others_go_on(record: Any, field: str | None, reason: str) -> None:
    first, refusal, last = read(OURS, record, {**OURS, "subject": "Bo"})
    assert isinstance(first, Submission)
    assert isinstance(last, Submission)
    assert isinstance(refusal, Refusal)
    assert (refusal.origin, refusal.field) == ("f.jsonl:2", field)
    assert reason in refusal.reason
    assert "pydantic" not in refusal.reason
    assert len(str(refusal)) < 500


def test_a_record_in_no_known_form_is_told_the_known_ones() -> None:
    reason = refuse_one({"question": "?", "answer": "!"}).reason
    assert reason.endswith("found an object with 'question', 'answer'")
    for telling in (
        "requested_rewrite",
        "src, alt",
        "locality, portability",
        "rephrase_prompt",
        "cf_rephrase_prompt",
        "subject, prompt with {}",
    ):
        assert telling in reason


# Files


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "expected edits, found an empty file"),
        (b"\xef\xbb\xbf\r\n \n", "expected edits, found an empty file"),
        (
            b"subject,prompt\nAda,{} lives in\n",
            "expected JSON lines or a JSON array in one of the known forms: CounterFact (requested_rewrite)",
        ),
        (b"\x1f\x8b\x08\x00", "expected JSON lines or a JSON array in one of the known forms"),
        (json.dumps(OURS).encode("utf-16"), "expected UTF-8, found UTF-16"),
    ],
)
def test_what_is_no_file_of_edits_is_refused_once(data: bytes, reason: str) -> None:
    (refusal,) = read_edits(io.BytesIO(data), "f.json")
    ((line, of_inbox),) = read_lines(data, "f.json")
    assert isinstance(refusal, Refusal)
    assert refusal.origin == "f.json"
    assert reason in refusal.reason
    assert (line, of_inbox) == (1, refusal)


def test_lines_are_counted_with_bom_crlf_and_blank_lines() -> None:
    row = json.dumps(OURS).encode()
    data = b"\xef\xbb\xbf\r\n" + row + b"\r\n\r\n  \r\n" + row + b"\r\noops\r\n"
    assert [line for line, _ in read_lines(data, "f")] == [2, 5, 6]
    assert [result.origin for result in read_edits(io.BytesIO(data), "f")] == ["f:2", "f:5", "f:6"]


def test_an_array_is_counted_by_index_and_keeps_its_good_records() -> None:
    data = json.dumps([OURS, {**OURS, "prompt": "x"}, FLAT], indent=2).encode()
    results = list(read_edits(io.BytesIO(b"\xef\xbb\xbf" + data), "f"))
    assert [(type(result), result.origin) for result in results] == [(Submission, "f[0]"), (Refusal, "f[1]"), (Submission, "f[2]")]


def test_a_truncated_array_keeps_its_whole_records_and_says_where_it_ends() -> None:
    data = json.dumps([OURS, FLAT, ZSRE], indent=2).encode()
    cut = data[:-40]
    *whole, last = read_edits(io.BytesIO(cut), "f")
    assert [type(result) for result in whole] == [Submission, Submission]
    assert isinstance(last, Refusal)
    assert last.origin == "f[2]"
    assert f"found the end of the file (line {len(cut.splitlines())})" in last.reason


def test_a_truncated_last_line_is_said_to_be_cut() -> None:
    *_, last = read(OURS, json.dumps(OURS).encode()[:-5])
    assert isinstance(last, Refusal)
    assert last.reason == "expected a whole record, found the end of the file inside it"


def test_objects_laid_out_over_several_lines_are_read() -> None:
    data = "\n".join(json.dumps(record, indent=2) for record in (OURS, FLAT))
    assert [type(result) for result in read(data.encode())] == [Submission, Submission]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_inbox_file_must_be_lines(indent: int | None) -> None:
    ((line, refusal),) = read_lines(json.dumps([OURS, OURS], indent=indent).encode(), "f")
    assert line == 1
    assert isinstance(refusal, Refusal)
    assert "expected one record per line" in refusal.reason


@pytest.mark.parametrize("damaged", [b"{", b"[1]", b"[]", b"oops"])
def test_a_damaged_first_line_does_not_spoil_the_rest_of_an_inbox_file(damaged: bytes) -> None:
    (_, first), (line, second) = read_lines(damaged + b"\n" + json.dumps(OURS).encode(), "f")
    assert isinstance(first, Refusal)
    assert (line, type(second)) == (2, Submission)


def test_a_path_is_named_as_given_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(OURS) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [result.origin for result in read_edits(path)] == [f"{path}:1"]
        assert [result.origin for result in read_edits(path, "inbox")] == ["inbox:1"]
        gc.collect()


def test_a_path_that_cannot_be_read_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing.json: expected a readable file of edits"):
        read_edits(tmp_path / "missing.json")
    with pytest.raises(InputError, match="expected a readable file of edits"):
        read_edits(tmp_path)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("counterfact_dev_10000.json", 10_000),
        ("counterfact_dev_enriched_3000.json", 3_000),
        ("knowedit_zsre_1304.json", 1_304),
        ("knowedit_wiki_counterfact_dev.json", 712),
    ],
)
def test_the_fields_data_sets_are_read_whole(name: str, count: int) -> None:
    path = SHARED / "data" / "edits" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; ERRATA_TEST_SHARED names the folder that holds it")
    results = list(read_edits(path))
    assert len(results) == count
    assert [str(result) for result in results if isinstance(result, Refusal)] == []
    records = json.loads(path.read_text())
    for record, result in zip(records, results, strict=True):
        assert isinstance(result, Submission)
        written_out = record["prompt"].replace("{}", record["subject"])
        assert result.edit.rewrite_prompt.split() == written_out.split()
        assert result.edit.target_new == record["target_new"].strip()


def test_aliases_are_read_and_are_no_part_of_who_an_edit_is() -> None:
    (found,) = read_edits(io.BytesIO(json.dumps({**OURS, "aliases": ["  Ada L.", "Lovelace"]}).encode()), "edits.jsonl")
    assert isinstance(found, Submission) and found.edit.aliases == ("Ada L.", "Lovelace")
    plain = Edit.model_validate(OURS)
    assert (found.edit.edit_id, found.edit.slot) == (plain.edit_id, plain.slot)
    assert json.loads(spell_submission(found))["aliases"] == ["Ada L.", "Lovelace"]
    assert Edit.model_validate(found.edit.model_dump(mode="json")) == found.edit
    for wrong, reason in ((["{}"], "aliases[0]: expected full text"), ([" "], "expected some text"), ("Ada", "aliases: expected a list")):
        (refused,) = read_edits(io.BytesIO(json.dumps({**OURS, "aliases": wrong}).encode()), "edits.jsonl")
        assert isinstance(refused, Refusal) and reason in str(refused)


def test_an_edit_without_aliases_keeps_the_bytes_it_had_before_there_were_any() -> None:
    stored = (
        b'{"id":null,"neighborhood_prompts":[],"note":null,"paraphrase_prompts":[],"portability_prompts":[],"prompt":"{} lives in",'
        b'"relation_id":null,"source":null,"subject":"Ada","submitted_at":null,"target_new":"Rome","target_true":null}'
    )
    assert canonical_json(Edit.model_validate(OURS)) == stored
    assert canonical_json(Edit.model_validate_json(stored).model_dump(mode="json")) == stored
