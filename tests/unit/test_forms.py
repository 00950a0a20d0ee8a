"""One fact in three forms: the same facts, questions whose answers are right, and nothing that depends on luck."""

import re

import pytest

from errata.edits import SLOT, Edit, canonical_json, digest_of
from errata.errors import InputError
from errata.forms import LETTERS, Form, make_formed_edits
from errata.world import RELATIONS, World, WorldSettings, make_world

FORMS: tuple[Form, ...] = ("direct", "choice", "judgement")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSettings(persons=200))


def read_options(prompt: str) -> dict[str, str]:
    """Letter → option of a question."""
    return dict(re.findall(r"\b([a-d])\) (\w+)", prompt))


def test_direct_edits_are_the_worlds_own(world: World) -> None:
    assert make_formed_edits(world, 50, 3, "direct") == world.make_edits(50, 3)
    assert digest_of(canonical_json(make_formed_edits(make_world(), 20, 0, "direct"))) == digest_of(
        canonical_json(make_world().make_edits(20, 0))
    )


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_ask_about_the_same_facts(world: World, form: Form) -> None:
    edits = make_formed_edits(world, 80, 1, form)
    assert edits == make_formed_edits(make_world(WorldSettings(persons=200)), 80, 1, form), "deterministic"
    assert edits != make_formed_edits(world, 80, 2, form)
    for edit, direct in zip(edits, world.make_edits(80, 1), strict=True):
        assert edit == Edit.model_validate(edit.model_dump()), "made by copying, so check it as any edit is checked"
        assert edit.subject == direct.subject and edit.prompt.count(SLOT) == 1 and edit.target_new != edit.target_true
        assert len(edit.paraphrase_prompts) == len(direct.paraphrase_prompts) and edit.rewrite_prompt not in edit.paraphrase_prompts
        assert all(edit.subject in prompt and SLOT not in prompt for prompt in edit.paraphrase_prompts)
        assert len(edit.neighborhood_prompts) == len(direct.neighborhood_prompts) > 0
        for probe, other in zip(edit.neighborhood_prompts, direct.neighborhood_prompts, strict=True):
            before, _, after = edit.prompt.partition(SLOT)
            name = probe.prompt.removeprefix(before).removesuffix(after)
            assert name in other.prompt and name != edit.subject
            assert bool(probe.answers) == (form == "direct")


def test_letters_are_right(world: World) -> None:
    edits = make_formed_edits(world, 200, 0, "choice")
    for edit, direct in zip(edits, world.make_edits(200, 0), strict=True):
        relation = next(relation for relation in RELATIONS if relation.name == direct.relation_id)
        for prompt in (edit.prompt, *edit.paraphrase_prompts, *(probe.prompt for probe in edit.neighborhood_prompts)):
            options = read_options(prompt)
            assert list(options) == list(LETTERS) and len(set(options.values())) == 4
            assert options[edit.target_new] == direct.target_new and options[edit.target_true or ""] == direct.target_true
            assert set(options.values()) <= set(relation.objects)
    assert {edit.target_new for edit in edits} == set(LETTERS), "no letter is always the answer"


def test_yes_is_said_of_the_new_object_and_no_of_the_old_one(world: World) -> None:
    edits = make_formed_edits(world, 200, 0, "judgement")
    for edit, direct in zip(edits, world.make_edits(200, 0), strict=True):
        said = {"yes": direct.target_new, "no": direct.target_true}[edit.target_new]
        assert {edit.target_new, edit.target_true} == {"yes", "no"}
        for prompt in (edit.prompt, *edit.paraphrase_prompts):
            assert prompt.startswith("Is it true that ") and prompt.endswith(f" {said}? Answer:")
    yes = sum(edit.target_new == "yes" for edit in edits)
    assert 60 < yes < 140


def test_a_form_contradicts_no_other(world: World) -> None:
    slots = [edit.slot for form in FORMS for edit in make_formed_edits(world, 50, 0, form)]
    assert len(set(slots)) == len(slots)


def test_what_is_impossible_is_said(world: World) -> None:
    with pytest.raises(InputError, match="direct, choice, judgement, found 'sonnet'"):
        make_formed_edits(world, 5, 0, "sonnet")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 200"):
        make_formed_edits(world, 201, 0, "choice")
