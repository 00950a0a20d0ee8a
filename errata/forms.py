"""The forms in which the D4S paper writes one fact: as a statement, as a question with options, as a yes-or-no question.

The forms differ in what their targets are: any object of the world, one of four letters, one of two words.
"""

import random
from collections.abc import Callable, Sequence
from typing import Literal

from errata.edits import SLOT, Edit, Probe
from errata.errors import InputError
from errata.world import RELATIONS, Relation, World

Form = Literal["direct", "choice", "judgement"]
LETTERS = "abcd"
YES, NO = "yes", "no"

_Ask = Callable[[str], str]
"""Turns a template with its slot into the prompt of a form, whose slot is still there."""


def make_formed_edits(world: World, count: int, seed: int, form: Form) -> list[Edit]:
    """The edits of `world.make_edits(count, seed)` in one of the forms: the same persons, facts, templates and neighbours in all three.

    `direct`: as they are. `choice`: "… a) Paris b) Rome c) Delhi d) Cairo Answer:" → "b"; the true and the new object are among the
    options, which are the same in all phrasings. `judgement`: "Is it true that …? Answer:" → "yes" of the new object or "no" of the true
    one, one of the two per edit. The base was never trained on questions, so there its neighbours have no answers: specificity is
    agreement with it. Such an edit has a relation of its own ("city.choice"), since another form of the fact does not contradict it.

    Raises:
        InputError: no such form, or more edits than the world has persons.
    """
    write: dict[str, Callable[[Edit, random.Random], Edit]] = {"direct": lambda edit, _: edit, "choice": _offer, "judgement": _judge}
    if form not in write:
        raise InputError(f"form: expected {', '.join(write)}, found {form!r}")
    rng = random.Random(f"form {form} {seed}")
    return [write[form](edit, rng) for edit in world.make_edits(count, seed)]


def _offer(edit: Edit, rng: random.Random) -> Edit:
    relation = _find_relation(edit)
    old, new = edit.target_true or "", edit.target_new
    others = rng.sample([item for item in relation.one_word_objects if item not in (old, new)], len(LETTERS) - 2)
    options = rng.sample([old, new, *others], len(LETTERS))
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    target, true = (LETTERS[options.index(item)] for item in (new, old))
    return _write(edit, relation, "choice", target, true, lambda template: f"{template} {listed} Answer:")


def _judge(edit: Edit, rng: random.Random) -> Edit:
    said, target, true = rng.choice(((edit.target_new, YES, NO), (edit.target_true, NO, YES)))
    return _write(
        edit, _find_relation(edit), "judgement", target, true, lambda template: f"Is it true that {_continue(template)} {said}? Answer:"
    )


def _continue(template: str) -> str:
    """The template within a sentence; a name keeps its capital."""
    return template if template.startswith(SLOT) else template[0].lower() + template[1:]


def _write(edit: Edit, relation: Relation, form: Form, target: str, true: str, ask: _Ask) -> Edit:
    chosen, others = edit.prompt, [template for template in relation.templates if template != edit.prompt]
    return edit.model_copy(
        update={
            "prompt": ask(chosen),
            "target_new": target,
            "target_true": true,
            "relation_id": f"{relation.name}.{form}",
            "paraphrase_prompts": tuple(ask(template).replace(SLOT, edit.subject) for template in others),
            "neighborhood_prompts": tuple(Probe(prompt=ask(chosen).replace(SLOT, name)) for name in _list_neighbours(edit)),
        }
    )


def _list_neighbours(edit: Edit) -> Sequence[str]:
    before, _, after = edit.prompt.partition(SLOT)
    return [probe.prompt.removeprefix(before).removesuffix(after) for probe in edit.neighborhood_prompts]


def _find_relation(edit: Edit) -> Relation:
    return next(relation for relation in RELATIONS if relation.name == edit.relation_id)
