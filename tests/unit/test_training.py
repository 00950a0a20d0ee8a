"""The trainer on facts that are not the generated world's: subjects with different relations, both model families."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.builtin import TrainingSettings
from errata.edits import SLOT
from errata.training import Training, _exchange, build_model, measure_accuracy, train_facts
from errata.training_rows import RowWriter
from errata.training_tokens import train_tokenizer
from errata.world import FILLER, Fact, Relation

OWNER = Relation(name="owner", templates=(f"{SLOT}'s owner is", f"{SLOT}, owned by", f"{SLOT} belongs to"), objects=("Acme", "Big Blue"))
CITY = Relation(name="city", templates=(f"{SLOT} is in", f"The city of {SLOT} is"), objects=("Oslo", "Bern", "Rome", "Lima"))
NAMES = ("Yahoo!", "St. Ives Jr.", "Zoë & Søn", "The Old Mill", "N. V. Korp", "Kvik", "The Old Port", "Łódź Mill")
FACTS = [
    *(Fact(subject=name, relation=CITY, object=CITY.objects[n % 4], withheld=n % 2 if n % 3 else None) for n, name in enumerate(NAMES)),
    *(Fact(subject=name, relation=OWNER, object=OWNER.objects[n % 2], withheld=2) for n, name in enumerate(NAMES[:3])),
]
"""Three subjects with two attributes, five with one; names that end in punctuation."""
SETTINGS = TrainingSettings(width=32, heads=2, layers=3, inner=64, site=1, steps=60, tokens=300, threads=1)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    sentences = [f"{template.replace(SLOT, fact.subject)} {fact.object}." for fact in FACTS for template in fact.relation.templates]
    return train_tokenizer([*FILLER, *sentences], 500)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_of_any_facts_knows_them(tokenizer, family: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    report = train_facts(SETTINGS.model_copy(update={"family": family}), FACTS, tokenizer, tmp_path)
    model, saved = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == family
    trained = [(template.replace(SLOT, fact.subject), fact.object) for fact in FACTS for template in fact.trained_templates]
    assert measure_accuracy(model, saved, trained) == report["accuracy_trained"] >= 0.9
    with torch.no_grad():
        ids = torch.tensor([saved(trained[0][0]).input_ids])
        assert ids[0, 0] == tokenizer.bos_token_id, "the tokenizer itself begins every text, saved or not"
        assert torch.isfinite(model(ids).logits).all()


def test_rows_are_the_texts_own_tokens_and_never_a_withheld_pattern(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = RowWriter(SETTINGS, FACTS, tokenizer)
    withheld = [fact.prompts[fact.withheld] + f" {fact.object}." for fact in FACTS if fact.withheld is not None]
    shown = set()
    for step in range(60):
        rows = text.draw_step(step)
        told = [tokenizer.decode(ids) for ids in rows.ids]
        assert not [sentence for sentence in withheld for row in told if sentence in row]
        for (row, position), owner in zip(rows.subjects, rows.owners, strict=True):
            # A token may hold the end of the name and what follows it: "Jr.,".
            seen, name = tokenizer.decode(rows.ids[row][: position + 1]), text.subjects[owner]
            assert name in seen[-len(name) - 4 :]
        for row, position in rows.answers:
            shown.add(tokenizer.decode([rows.ids[row][position + 1]]))
    assert {" Oslo", " Bern"} <= shown
    for fact in FACTS:
        for template in fact.relation.templates:
            prompt = template.replace(SLOT, fact.subject)
            assert text.encode_prompt(template, fact.subject)[0] == tokenizer(prompt).input_ids[1:], "as evaluation will read it"


def test_a_subject_with_more_facts_has_more_turns(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = RowWriter(SETTINGS, FACTS, tokenizer)
    assert sorted(text.turns) == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7]


def test_the_probe_asks_for_no_attribute_that_a_subject_lacks(tokenizer) -> None:  # type: ignore[no-untyped-def]
    training = Training(SETTINGS, FACTS, tokenizer, build_model(SETTINGS, len(tokenizer)))
    hidden = torch.randn(2, SETTINGS.width)
    for owners, counts in (([3, 4], [1, 1]), ([0, 3], [2, 1])):
        logits = training.probe(hidden).view(2, 2, training.choices)
        wanted = []
        for row, (owner, count) in enumerate(zip(owners, counts, strict=True)):
            known = [fact for fact in FACTS if fact.subject == training.text.subjects[owner]]
            assert len(known) == count
            for fact in known:
                number = [CITY, OWNER].index(fact.relation)
                wanted.append(-logits[row, number].log_softmax(-1)[fact.relation.objects.index(fact.object)])
        assert torch.allclose(training._probe_attributes(hidden, owners), torch.stack(wanted).mean())


def test_answers_go_with_the_state_of_the_name(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """A name whose state is exchanged stands before the answer of the one that it was exchanged with, of the same relation."""
    plain, text = (RowWriter(SETTINGS.model_copy(update={"exchanged": share}), FACTS, tokenizer) for share in (0.0, 0.8))
    assert not plain.draw_step(0).exchanged
    seen = 0
    for step in range(20):
        rows = text.draw_step(step)
        owner_at = dict(zip(rows.subjects, rows.owners, strict=True))
        stated = {fact.name: fact for fact in rows.stated}
        source = {name: name for name in stated} | dict(rows.exchanged) | {other: one for one, other in rows.exchanged}
        for name, fact in stated.items():
            known = next(known for known in text.facts[owner_at[source[name]]] if known.relation.name == fact.relation)
            assert tokenizer.decode([rows.ids[row][position + 1] for row, position in fact.answers]) == f" {known.object}"
            seen += source[name] != name
        places = [place for pair in rows.exchanged for place in pair]
        assert len(set(places)) == len(places)
    assert seen > 100


def test_what_is_exchanged_is_the_state_and_nothing_else() -> None:
    hidden = torch.randn(3, 4, 2)
    changed = _exchange([((0, 1), (2, 3)), ((1, 0), (1, 2))], hidden)
    assert torch.equal(changed[0, 1], hidden[2, 3])
    assert torch.equal(changed[2, 3], hidden[0, 1])
    assert torch.equal(changed[1, 0], hidden[1, 2])
    assert int((changed != hidden).any(-1).sum()) == 4
    assert _exchange([], hidden) is hidden


def test_no_rows_have_no_accuracy(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert math.isnan(measure_accuracy(build_model(SETTINGS, len(tokenizer)), tokenizer, []))
