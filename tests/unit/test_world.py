"""The generated world: equal everywhere, free of contradictions, and its edits are what they say they are."""

import unicodedata
from collections import Counter
from itertools import pairwise

import pytest

from errata.edits import SLOT
from errata.errors import InputError
from errata.world import RELATIONS, World, WorldSettings, make_world

KINDS = ("distinct", "slots", "mixed")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSettings(persons=200))


def test_equal_settings_make_equal_worlds(world: World) -> None:
    again = make_world(WorldSettings(persons=200))
    assert again.facts == world.facts
    assert again.corpus(seed=3) == world.corpus(seed=3)
    for kind in KINDS:
        assert again.make_edits(40, 5, kind) == world.make_edits(40, 5, kind)


def test_another_seed_makes_other_facts_and_other_edits(world: World) -> None:
    assert make_world(WorldSettings(persons=200, seed=1)).facts != world.facts
    assert world.make_edits(40, 0) != world.make_edits(40, 1)
    assert world.corpus(seed=0) != world.corpus(seed=1)


def test_each_person_has_one_value_per_relation(world: World) -> None:
    assert len(set(world.persons)) == 200
    assert [(fact.subject, fact.relation.name) for fact in world.facts] == [(p, r.name) for p in world.persons for r in RELATIONS]
    assert all(fact.object in fact.relation.objects for fact in world.facts)


def test_no_word_of_a_name_identifies_its_person() -> None:
    """Otherwise a model could look a fact up before it has put the subject together."""
    bearers = Counter(word for person in make_world().persons for word in set(person.split()))
    assert min(bearers.values()) > 1


def test_names_stay_as_they_are_in_an_edit(world: World) -> None:
    assert any(not person.isascii() for person in world.persons)
    assert all(unicodedata.normalize("NFC", person) == person for person in world.persons)
    assert {edit.subject for edit in world.make_edits(200, 0)} == set(world.persons)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_contradicts_the_world_and_its_prompts_name_its_subject(world: World, kind: str) -> None:
    for edit in world.make_edits(100, 0, kind):
        fact = world.by_slot[edit.subject, edit.relation_id or ""]
        assert edit.target_true == fact.object
        assert edit.target_new != fact.object
        assert edit.target_new in fact.relation.objects
        assert {edit.rewrite_prompt, *edit.paraphrase_prompts} == set(fact.prompts)
        assert len(edit.paraphrase_prompts) == len(fact.prompts) - 1
        assert all(edit.subject in prompt for prompt in fact.prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_share_the_old_object_and_are_never_edited(world: World, kind: str) -> None:
    edits = world.make_edits(100, 0, kind)
    edited = {edit.subject for edit in edits}
    for edit in edits:
        assert edit.neighborhood_prompts
        for probe in edit.neighborhood_prompts:
            before, after = edit.prompt.split(SLOT)
            neighbour = probe.prompt.removeprefix(before).removesuffix(after)
            assert neighbour not in edited
            assert probe.answers == (edit.target_true,)
            assert world.by_slot[neighbour, edit.relation_id or ""].object == edit.target_true


def test_distinct_edits_name_each_person_once_and_need_one_token(world: World) -> None:
    edits = world.make_edits(200, 0, "distinct")
    assert len({edit.subject for edit in edits}) == 200
    assert not any(" " in f"{edit.target_new}{edit.target_true}" for edit in edits)


def test_a_stream_of_slots_names_each_fact_once_and_half_of_the_persons(world: World) -> None:
    edits = world.make_edits(400, 0, "slots")
    assert len({(edit.subject, edit.relation_id) for edit in edits}) == 400
    assert len({edit.subject for edit in edits}) <= 100
    assert not any(" " in f"{edit.target_new}{edit.target_true}" for edit in edits)
    with pytest.raises(InputError, match="those of half of the persons, found 601"):
        world.make_edits(601, 0, "slots")


def test_a_mixed_stream_holds_what_makes_streams_hard(world: World) -> None:
    edits = world.make_edits(100, 0, "mixed")
    by_slot: dict[tuple[str, ...], list[str]] = {}
    for edit in edits:
        by_slot.setdefault(edit.slot, []).append(edit.target_new)
    relations = Counter(subject for subject, _ in {(edit.subject, edit.relation_id) for edit in edits})
    assert sum(count > 1 for count in relations.values()) >= 10, "several facts of one person"
    assert sum(len(targets) > 1 for targets in by_slot.values()) >= 10, "re-edits of a slot"
    assert all(old != new for targets in by_slot.values() for old, new in pairwise(targets)), "a re-edit says something new"
    assert sum(" " in edit.target_new for edit in edits) >= 10, "targets of two words"


def test_more_edits_than_persons_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="at most 200.*found 201"):
        world.make_edits(201, 0, "distinct")
    with pytest.raises(InputError, match="at most 600"):
        world.make_edits(601, 0, "mixed")


def test_untouched_facts_are_true_and_of_persons_no_edit_names(world: World) -> None:
    edits = world.make_edits(150, 0)
    rows = world.untouched(edits)
    assert len(rows) == 50 * len(RELATIONS)
    edited = {edit.subject for edit in edits}
    assert set(rows) <= {(prompt, fact.object) for fact in world.facts if fact.subject not in edited for prompt in fact.prompts}


def test_withheld_phrasings_never_occur_in_the_corpus(world: World) -> None:
    withheld = {f"{fact.prompts[fact.withheld]} {fact.object}." for fact in world.facts if fact.withheld is not None}
    assert withheld
    assert not withheld & set(world.corpus(seed=0, count=20_000))
