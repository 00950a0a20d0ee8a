"""The real-fact base of the benchmarks: patterns, the choice of facts and edits, and that a second run trains nothing."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import real_facts
from benchmarks.fact_choice import (
    FEWEST,
    TEMPLATES,
    Choice,
    choose_facts,
    choose_templates,
    open_pattern,
    read_patterns,
    read_records,
    read_truths,
)
from errata.builtin import TrainingSettings
from errata.edits import SLOT, Edit, Submission
from errata.errors import InputError
from errata.evaluation.probes import split_probes
from errata.modeling.loading import load_base
from errata.readers.files import read_edits

DATA = Path(__file__).parents[3] / "shared" / "data"
CITIES, OWNERS = ("Oslo", "Bern", "Rome"), ("Acme", "Initech")
_LASTS = ("Mill", "Tower", "Port", "Hall")
NAMES = tuple(f"{first} {last}" for first in ("Red", "Old", "Tall", "Grey", "North", "Low") for last in _LASTS)
PATTERNS = {
    "P1": [
        "[X] is located in [Y].",
        "[X] can be found in [Y] .",
        "[X], in [Y].",
        "The [Y]-based [X]",
        "[X] is located in the city of [Y].",
    ],
    "P2": ["[X] is owned by [Y].", "[X] belongs to [Y]", "[X], a property of [Y].", "[Y] owns [X]."],
    "P3": ["[X] likes [Y]."],
}


def write_table(folder: Path) -> Path:
    """The data's layout, small: every name has a city, every third an owner as well, and half are in a record."""
    patterns, truths = folder / "facts/pararel/patterns", folder / "facts/pararel/trex_lms_vocab"
    for place in (patterns, truths, folder / "edits"):
        place.mkdir(parents=True)
    for name, found in PATTERNS.items():
        (patterns / f"{name}.jsonl").write_text("".join(json.dumps({"pattern": text}) + "\n" for text in found))
    known = {
        "P1": [(name, CITIES[n % 3]) for n, name in enumerate(NAMES)] + [("Twofold", "Oslo"), ("Twofold", "Bern")],
        "P2": [(name, OWNERS[n % 2]) for n, name in enumerate(NAMES[::3])],
        "P3": [("Red Mill", "grain")],
    }
    for name, facts in known.items():
        lines = [json.dumps({"sub_label": subject, "obj_label": item}) + "\n" for subject, item in facts]
        (truths / f"{name}.jsonl").write_text("".join(lines))
    records = [
        {
            "case_id": n,
            "relation_id": "P1",
            "subject": name,
            "prompt": "{} can be found in" if n % 2 else "{} sits in",
            "target_new": CITIES[(n + 1) % 3],
            "target_true": CITIES[n % 3],
            "paraphrase_prompts": [f"{name}, in"],
            "neighborhood_prompts": [],
        }
        for n, name in enumerate(NAMES[:12])
    ]
    records += [{**records[0], "subject": "Nowhere"}, {**records[1], "target_new": "Atlantis"}, {**records[2], "target_true": "Lima"}]
    (folder / "edits/counterfact_dev_enriched_3000.json").write_text(json.dumps(records))
    return folder


def choose(data: Path, count: int, seed: int = 0) -> Choice:
    patterns, truths = read_patterns(data / "facts/pararel/patterns"), read_truths(data / "facts/pararel/trex_lms_vocab")
    return choose_facts(patterns, truths, read_records(data / "edits/counterfact_dev_enriched_3000.json"), count, seed)


def check_choice(choice: Choice) -> None:
    """What holds of every choice."""
    by_slot = {(fact.relation.name, fact.subject): fact for fact in choice.facts}
    assert len(by_slot) == len(choice.facts)
    assert len({edit.slot for edit in choice.edits}) == len(choice.edits) > 0
    for edit in choice.edits:
        fact = by_slot[str(edit.relation_id), edit.subject]
        assert fact.object == edit.target_true != edit.target_new
        assert edit.target_new in fact.relation.objects
        assert {edit.rewrite_prompt, *edit.paraphrase_prompts} == set(fact.prompts)
        assert fact.withheld is not None
        assert split_probes(edit, seed=0).held_out.paraphrases == (fact.prompts[fact.withheld],), (
            "what evaluation holds out was not trained"
        )
        assert edit.prompt in fact.trained_templates
    said: dict[str, str] = {}
    for fact in choice.facts:
        assert FEWEST <= len(fact.relation.templates) <= TEMPLATES
        for prompt in fact.prompts:
            assert said.setdefault(prompt, fact.object) == fact.object, "one question, one answer"


@pytest.mark.parametrize(
    ("pattern", "prompt"),
    [
        ("[X] was born in [Y].", "{} was born in"),
        ("[X] is owned by [Y] .", "{} is owned by"),
        ("[X],  a type of [Y]", "{}, a type of"),
        ("[X] was a [Y]-born person.", None),
        ("[Y] owns [X] .", None),
        ("It is in [Y]", None),
        ("[Y] and [X] are [Y]", None),
        ("[X] of [X] is [Y]", None),
        ("[X] {} [Y]", None),
    ],
)
def test_only_patterns_that_end_in_the_object_are_prompts(pattern: str, prompt: str | None) -> None:
    assert open_pattern(pattern) == prompt


def test_templates_are_pararels_then_counterfacts_and_none_begins_another() -> None:
    used = ["{} performs"] * 3 + ["{} plays"] * 2 + ["{}, the"]
    assert choose_templates(["{} plays the", "{} plays", "{}, who plays"], used) == ["{} plays", "{}, who plays", "{} performs", "{}, the"]
    assert len(choose_templates([f"{{}} says {n}" for n in "abcdef"], [])) == TEMPLATES


def test_facts_are_those_of_records_first_then_neighbours_then_other_relations(tmp_path: Path) -> None:
    data = write_table(tmp_path)
    choice = choose(data, 100)
    check_choice(choice)
    assert [edit.subject for edit in choice.edits] == list(NAMES[:12]), "records whose truth T-REx does not hold are no edits"
    assert {edit.prompt for edit in choice.edits[1::2]} == {"{} can be found in"}, "a record's own prompt, where it is a template"
    assert "Twofold" not in {fact.subject for fact in choice.facts}
    assert {fact.relation.name for fact in choice.facts} == {"P1", "P2"}
    assert all(len(found) >= 3 for found in choice.list_neighbours().values() if found[0].relation.name == "P1")
    few = choose(data, 14)
    check_choice(few)
    assert len(few.facts) == 14
    assert len(few.edits) <= 7
    assert choose(data, 14) == few
    assert sorted(line.rsplit(" ", 1)[1] for line in choice.corpus(0)) == sorted(f"{fact.object}." for fact in choice.facts)


def test_what_is_trained_is_written_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    choice = choose(write_table(tmp_path / "data"), 100)
    settings = TrainingSettings(width=32, heads=2, layers=3, inner=64, site=1, steps=120, tokens=300, threads=1)
    report = real_facts.provide_base(choice, settings, tmp_path / "first", vocabulary=500)
    assert report["facts"] == len(choice.facts)
    assert report["records_known"] >= 8 <= len(choice.edits)
    edits = [record.edit for record in read_edits(tmp_path / "first" / "edits.jsonl") if isinstance(record, Submission)]
    assert len(edits) == report["records_known"]
    assert {edit.edit_id for edit in edits} <= {edit.edit_id for edit in choice.edits}, "probes do not change what is held out"
    base = load_base(tmp_path / "first" / "base", device="cpu")
    asked = [(probe.prompt, probe.answers[0]) for edit in edits for probe in edit.neighborhood_prompts]
    asked += [(edit.rewrite_prompt, str(edit.target_true)) for edit in edits]
    assert real_facts.share(base, asked) == 1.0
    edited = {edit.subject for edit in choice.edits}
    assert not [prompt for prompt, _ in asked[: -len(edits)] if any(name in prompt for name in edited)]

    monkeypatch.setattr(real_facts, "train_facts", lambda *_: pytest.fail("trained again"))
    assert real_facts.provide_base(choice, settings, tmp_path / "second", vocabulary=500) == report
    assert (tmp_path / "second" / "edits.jsonl").read_bytes() == (tmp_path / "first" / "edits.jsonl").read_bytes()
    other = choice.facts[0].model_copy(update={"object": "elsewhere"})
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        real_facts.provide_base(Choice([other, *choice.facts[1:]], choice.edits), settings, tmp_path / "third", vocabulary=500)


def test_a_folder_without_the_data_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected ParaRel's patterns"):
        read_patterns(tmp_path)
    with pytest.raises(InputError, match="expected T-REx facts"):
        read_truths(tmp_path)
    (tmp_path / "P1.jsonl").write_text('{"sub_label"\n')
    with pytest.raises(InputError, match=r"P1\.jsonl:1: expected a JSON object"):
        read_truths(tmp_path)


@pytest.mark.skipif(not (DATA / "facts/pararel").is_dir(), reason=f"needs the T-REx facts, which are not in {DATA}")
def test_the_real_data_gives_enough_edits() -> None:
    choice = choose(DATA, 4_000)
    check_choice(choice)
    assert len(choice.facts) == 4_000
    assert len({edit.subject_key for edit in choice.edits}) >= 1_500
    near = choice.list_neighbours()
    sample: list[Edit] = random.Random(0).sample(choice.edits, 100)
    assert all(near[str(edit.relation_id), str(edit.target_true)] for edit in sample)
    assert not [fact for fact in choice.facts if SLOT in fact.subject]
