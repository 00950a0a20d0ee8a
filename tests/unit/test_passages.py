"""In-context passages: what the contextual base is trained on, and that the other bases are trained as before."""

import hashlib
import random
from itertools import islice
from pathlib import Path

import pytest

from errata.builtin import BUILTIN, CONTEXTUAL, NAMED, SMALL, SMALL_CONTEXTUAL, BuiltinSettings, ensure_builtin
from errata.edits import SLOT
from errata.modeling.loading import load_base
from errata.passages import DEMONSTRATIONS, OPENERS, Passage, draw_passage
from errata.profiles import parse_profile
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact
from errata.settings import load_settings
from errata.suggestions import BUILTIN_SUGGESTION, suggest_builtin
from errata.training import measure_accuracy
from errata.training_rows import OPENING, RowWriter
from errata.training_tokens import train_world_tokenizer
from errata.world import RELATIONS, World, WorldSettings, make_world
from registry.shared import get_base, get_profile
from tasks.onboarding import start_stream

WORLD = make_world(WorldSettings(persons=60))
MOST = max(DEMONSTRATIONS)


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    rng = random.Random(0)
    return [draw_passage(WORLD.facts, rng.choice(DEMONSTRATIONS), 0.5, rng) for _ in range(200)]


def start_text(settings: BuiltinSettings, world: World) -> RowWriter:
    return RowWriter(settings, world.facts, train_world_tokenizer(passages=settings.passages > 0))


def test_the_older_bases_keep_their_digests() -> None:
    assert (BUILTIN.digest, SMALL.digest) == ("8c9cb84cd72c80c0", "63feb251d3a4902c")
    assert len({CONTEXTUAL.digest, SMALL_CONTEXTUAL.digest, BUILTIN.digest, SMALL.digest}) == 4
    assert BuiltinSettings(**BUILTIN.model_dump(mode="json")) == BUILTIN
    assert BuiltinSettings(**CONTEXTUAL.model_dump(mode="json")) == CONTEXTUAL
    assert NAMED["builtin"] == BUILTIN


def test_the_older_bases_are_trained_on_the_same_text() -> None:
    """Tokens and marks of the first steps, and the tokenizer, as they were before there were passages."""
    text = start_text(SMALL, make_world(SMALL.world))
    content = hashlib.sha256()
    for step in range(20):
        rows = text.draw_step(step)
        content.update(repr((rows.ids, rows.subjects, rows.owners, rows.answers)).encode())
    content.update(text.tokenizer.backend_tokenizer.to_str().encode())
    assert content.hexdigest() == "f93b3c275ab41410ac0c31d7621c22f35ec3de5d7b029a9815d6cd8fae5f6f0a"


def test_a_passage_is_what_an_edit_memory_writes(passages: list[Passage]) -> None:
    for passage in passages:
        text = passage.text
        *shown, question = text.split("New Fact: ")[1:]
        facts = []
        for piece in shown:
            stated, prompted = piece.rstrip("\n").split("\nPrompt: ")
            target = next(item for relation in RELATIONS for item in relation.objects if stated.endswith(f" {item}") and item in prompted)
            paraphrase = prompted.removesuffix(f" {target}")
            facts.append(Fact("", "", stated.removesuffix(f" {target}"), target, (), (paraphrase,)))
        query = question.split("\nPrompt: ")[1]
        start, end = passage.answers[-1]
        asked = "".join(spell_context(facts[-1], facts[:-1], query[: query.rindex(text[start:end]) - 1]))
        assert text == f"{asked} {text[start:end]}."


def test_answers_and_names_are_marked_where_they_stand(passages: list[Passage]) -> None:
    objects = {item for relation in RELATIONS for item in relation.objects}
    for passage in passages:
        text = passage.text
        assert len(passage.answers) == len(passage.stated) == text.count("Prompt:")
        assert all(text[start:end] in objects for start, end in (*passage.answers, *passage.stated))
        for (begun, ended), (start, end) in zip(passage.stated[:-1], passage.answers[:-1], strict=True):
            assert text[begun:ended] == text[start:end], "a demonstration is answered by the fact before it"
            assert text[ended] == "\n" == text[end]
            assert "Prompt:" in text[ended:start]
        assert passage.breaks == tuple((end, end + 1) for _, end in passage.answers[:-1])
        assert passage.answers[-1][1] == len(text) - 1
        assert all(text[:end].endswith(name) for end, name in passage.subjects)
        assert len({end for end, _ in passage.subjects}) == 2 * text.count("Prompt:")


def test_questions_are_answered_by_the_fact_or_by_the_truth() -> None:
    rng, truths = random.Random(1), {(fact.subject, prompt): fact.object for fact in WORLD.facts for prompt in fact.prompts}
    followed = {0.0: 0, 1.0: 0}
    contradicted = 0
    for retained in followed:
        for _ in range(100):
            passage = draw_passage(WORLD.facts, 1, retained, rng)
            said, fact = (passage.text[slice(*span)] for span in (passage.answers[-1], passage.stated[-1]))
            query = passage.text[: passage.answers[-1][0] - 1].rpartition("Prompt: ")[2]
            (truth,) = {answer for (_, prompt), answer in truths.items() if prompt == query}
            assert said == (truth if retained else fact)
            followed[retained] += said == fact
            contradicted += not retained and said != truth
    assert followed[0.0] == 100
    assert followed[1.0] < 20, "another person, or another relation"
    assert contradicted > 80, "memory is no help"


def test_withheld_phrasings_stay_unseen(passages: list[Passage]) -> None:
    withheld = {fact.prompts[fact.withheld] for fact in WORLD.facts if fact.withheld is not None}
    asked = [line.partition(": ")[2] for passage in passages for line in passage.text.splitlines() if line]
    prompts = {prompt for fact in WORLD.facts for prompt in fact.prompts if any(line.startswith(f"{prompt} ") for line in asked)}
    assert len(prompts) > 300
    assert not prompts & withheld


@pytest.mark.parametrize("settings", [CONTEXTUAL, SMALL_CONTEXTUAL])
def test_the_longest_passage_has_room(settings: BuiltinSettings) -> None:
    tokenizer = train_world_tokenizer(passages=True)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    template = max((template for relation in RELATIONS for template in relation.templates), key=count)
    name = max(make_world(settings.world).persons, key=count)
    target = max((item for relation in RELATIONS for item in relation.objects), key=count)
    prompt = template.replace(SLOT, name)
    fact = Fact("", name, template, target, (), (prompt,))
    longest = "".join(spell_context(fact, [fact] * MOST, prompt)) + f" {target}."
    assert count(longest) + 2 <= settings.positions  # an end before and after
    assert max(OPENERS) <= MOST


def test_the_layouts_words_are_few_tokens_and_pieces_join() -> None:
    tokenizer = train_world_tokenizer(passages=True)
    fact = Fact("", "Anna Keller", f"{SLOT} works as a", "poet", (), ("Anna Keller earns a living as a",))
    pieces = spell_context(fact, [fact], "By training Anna Keller is a")
    ids = tokenizer("".join(pieces), add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == " " + "".join(pieces)
    words = sum(len(piece.replace(":", " : ").replace("\n", " N ").split()) for piece in pieces)
    assert len(ids) == words, "one token per word, colon and line end"
    assert len(tokenizer("Anna Keller New York").input_ids) == 5


def test_the_trainer_marks_what_a_passage_marks() -> None:
    world = make_world(SMALL_CONTEXTUAL.world)
    text = start_text(SMALL_CONTEXTUAL, world)
    for step in range(OPENING - 10, OPENING + 50):
        rows = text.draw_step(step)
        assert max(map(len, rows.ids)) <= SMALL_CONTEXTUAL.positions
        if not rows.unlearned:
            assert step >= OPENING, "passages alone at the beginning"
            continue
        objects = {item for relation in RELATIONS for item in relation.objects}
        answers: dict[int, list[int]] = {row: [] for row in range(len(rows.ids))}
        for row, position in rows.answers:
            answers[row].append(rows.ids[row][position + 1])
        for row, ids in answers.items():
            rest = text.tokenizer.decode(ids).strip()
            while rest:
                rest = next(rest.removeprefix(item).strip() for item in objects if rest.startswith(item))
            assert text.tokenizer.decode(rows.ids[row]).count("Prompt:") <= len(ids)
        assert not set(rows.unlearned) & set(rows.answers)
        for (row, position), person in islice(zip(rows.subjects, rows.owners, strict=True), 40):
            assert text.tokenizer.decode(rows.ids[row][: position + 1]).endswith(world.persons[person])


@pytest.mark.slow
def test_the_small_contextual_base_remembers_and_reads(tmp_path: Path) -> None:
    base = load_base(ensure_builtin(SMALL_CONTEXTUAL, tmp_path), device="cpu")
    world = make_world(SMALL_CONTEXTUAL.world)
    assert base.context == SMALL_CONTEXTUAL.positions
    assert measure_accuracy(base.model, base.tokenizer, world.untouched([])) >= 0.9
    rows = []
    for edit in world.make_edits(20, 0):
        fact = Fact(edit.edit_id, edit.subject, edit.prompt, edit.target_new, (), edit.paraphrase_prompts)
        rows += [("".join(spell_context(fact, (), prompt)), edit.target_new) for prompt in (edit.rewrite_prompt, *edit.paraphrase_prompts)]
    assert measure_accuracy(base.model, base.tokenizer, rows) >= 0.8, "a fact in front contradicts memory, and is followed"


def test_each_base_of_the_project_has_its_own_profile() -> None:
    assert set(NAMED) == {"builtin", "builtin-contextual"}
    own, first = (suggest_builtin(settings.digest) for settings in (CONTEXTUAL, BUILTIN))
    assert first is BUILTIN_SUGGESTION
    assert own.origin != first.origin
    assert max(own.prepare.layers) <= CONTEXTUAL.site < CONTEXTUAL.layers


def test_a_stream_on_the_contextual_base_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = SMALL_CONTEXTUAL.model_copy(update={"steps": 2})
    monkeypatch.setitem(NAMED, "builtin-contextual", tiny)
    monkeypatch.setattr("errata.suggestions.CONTEXTUAL", tiny)
    settings = load_settings(root=str(tmp_path / "root"), cache=tmp_path / "cache", stream="main")
    stream = start_stream(settings, "builtin-contextual")
    base = get_base(stream.storage, stream.head.base)
    assert (base.kind, base.source) == ("builtin", tiny.digest)
    profile = parse_profile(get_profile(stream.storage, base.digest, stream.head.profile))
    assert profile.origin == suggest_builtin(tiny.digest).origin != BUILTIN_SUGGESTION.origin
