"""Multiple choice, and the files it is read from."""

from pathlib import Path

import pytest

from errata.errors import InputError
from errata.evaluation.abilities import measure_ability
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.readers.abilities import AbilityQuestion, read_abilities
from errata.world import make_world

CHOICES = ("Paris", "Rome and Oslo", "French")


def test_the_likeliest_choice_per_token_counts(base: Base) -> None:
    scored = score_targets(base, [("Anna lives in", choice) for choice in CHOICES], batch_tokens=512)
    losses = [-sum(item.logprobs) / len(item.logprobs) for item in scored.values()]
    best = losses.index(min(losses))
    right = AbilityQuestion(question="Anna lives in", choices=CHOICES, answer=best)
    wrong = right.model_copy(update={"answer": (best + 1) % 3})
    tied = AbilityQuestion(question="Anna lives in", choices=(CHOICES[best], CHOICES[best]), answer=0)
    assert [measure_ability(base, [item], batch_tokens=512).value for item in (right, wrong, tied)] == [1.0, 0.0, 0.0]
    assert measure_ability(base, [right, wrong, right], batch_tokens=512).value == pytest.approx(2 / 3)
    assert measure_ability(base, [], batch_tokens=512).value is None


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "abilities.jsonl"
    path.write_text('{"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}\n\n')
    assert read_abilities(path) == [AbilityQuestion(question="2 + 2 =", choices=("4", "5"), answer=0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one question"),
        ("{", ":1: expected JSON"),
        ('{"question": "2 + 2 =", "choices": ["4", "5"], "answer": 2}', ":1: .*found 2"),
        ('\n{"question": "2 + 2 =", "choices": ["4"], "answer": 0}', ":2: "),
    ],
)
def test_what_is_no_question_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "abilities.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_abilities(path)


def test_the_world_asks_about_what_the_base_was_taught() -> None:
    world = make_world()
    questions = world.make_questions(20, 0)
    assert questions == world.make_questions(20, 0) and len({person for person, _ in questions}) == 20
    for person, item in questions:
        facts = {fact.object for fact in world.facts_of(person)}
        assert person in item.question and item.choices[item.answer] in facts and len(set(item.choices)) == 4
