"""Streams: from the world, and from edits of one's own."""

import pytest

from benchmarks.tiny_base import PEOPLE, build_edit
from errata.comparison.catalogue import choose_methods
from errata.comparison.material import draw_edits, draw_world
from errata.edits import Edit, Probe
from errata.errors import InputError
from errata.world import WorldSettings, make_world

ANSWERS = ("Paris", "Rome", "Oslo", "Bern")
OWN = [
    build_edit(person, relation, person, relation_id=f"P{relation}", target_true=ANSWERS[(person + relation) % 4])
    for person in range(12)
    for relation in range(2)
]


def draw(edits: list[Edit], count: int, seed: int = 0) -> tuple[list[str], object]:
    material = draw_edits(edits, count, seed, ["It rains.", f"{PEOPLE[0]} sleeps."], "own", lambda _: True)
    return [edit.edit_id for edit in material.edits], material


def test_a_seed_gives_a_stream_and_another_seed_another() -> None:
    assert draw(OWN, 8)[0] == draw(OWN, 8)[0]
    assert draw(OWN, 8)[0] != draw(OWN, 8, seed=1)[0]


def test_surroundings_name_no_subject_of_the_stream() -> None:
    material = draw_edits(OWN, 6, 0, [f"{name} sleeps." for name in PEOPLE], "own", lambda _: True)
    edited = {edit.subject for edit in material.edits}
    assert material.pool and not edited & {edit.subject for edit in material.pool}
    assert material.texts and not any(name in text for name in edited for text in material.texts)
    assert material.questions and not any(name in item.question for name in edited for item in material.questions)
    for item in material.questions:
        assert len(set(item.choices)) == 4 and 0 <= item.answer < 4


def test_a_neighbour_whom_the_stream_edits_is_left_out() -> None:
    edits = [build_edit(0, neighborhood_prompts=(Probe(prompt=f"The home of {PEOPLE[1]}"), Probe(prompt="The home of Kim"))), build_edit(1)]
    material = draw_edits(edits, 2, 0, [], "own", lambda _: True)
    (probes,) = [edit.neighborhood_prompts for edit in material.edits if edit.neighborhood_prompts]
    assert [probe.prompt for probe in probes] == ["The home of Kim"]


def test_one_slot_is_drawn_once_and_what_does_not_fit_is_left_out() -> None:
    edits = [build_edit(0), build_edit(0, answer=1), build_edit(1), build_edit(2)]
    material = draw_edits(edits, 2, 0, [], "own", lambda edit: edit.subject != PEOPLE[2])
    assert {edit.subject for edit in material.edits} == {PEOPLE[0], PEOPLE[1]}
    with pytest.raises(InputError, match="expected at least 3 edits that this base can be asked about, found 2"):
        draw_edits(edits, 3, 0, [], "own", lambda edit: edit.subject != PEOPLE[2])


def test_the_world_gives_all_that_is_asked() -> None:
    world = make_world(WorldSettings(persons=60))
    material = draw_world(world, 20, 3, "slots")
    assert material == draw_world(world, 20, 3, "slots")
    edited = {edit.subject for edit in material.edits}
    assert len(material.edits) == 20
    assert material.questions and material.pool and material.texts
    assert not any(name in text for name in edited for text in (*material.texts, *(item.question for item in material.questions)))


def test_methods_are_named_or_all() -> None:
    assert choose_methods("base") == ["base"]
    assert choose_methods("all")[0] == "base"
    with pytest.raises(InputError, match="methods: expected 'all' or some of base.*found 'mimit'"):
        choose_methods("base,mimit")
