"""What all methods of a comparison are given and asked: one stream of edits per seed, and what must not change beside it."""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict

from errata.edits import Edit, Probe, canonical_json, digest_of
from errata.errors import InputError
from errata.readers.abilities import AbilityQuestion
from errata.world import World

Kind = Literal["distinct", "slots", "mixed"]
_POOL = 100
_TEXTS = 64
_QUESTIONS = 200
_CHOICES = 4


class Material(BaseModel):
    """One stream with its surroundings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Where it comes from, for people."""
    edits: tuple[Edit, ...]
    """In order of arrival."""
    pool: tuple[Edit, ...]
    """About subjects that the stream does not name: demonstrations."""
    texts: tuple[str, ...]
    """Passages that name no subject of the stream, for perplexity."""
    questions: tuple[AbilityQuestion, ...]
    """Multiple choice about other subjects; empty where the data allows none."""

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))


def draw_world(world: World, count: int, seed: int, kind: Kind) -> Material:
    """A stream of the built-in world.

    Raises:
        InputError: the world is too small for it.
    """
    edits = world.make_edits(count, seed, kind)
    edited = {edit.subject for edit in edits}
    others = [edit for edit in world.make_edits(len(world.persons), 1_000 + seed) if edit.subject not in edited]
    texts = (text for text in world.corpus(seed=1_000 + seed) if not any(name in text for name in edited))
    questions = [question for person, question in world.make_questions(len(world.persons), seed) if person not in edited]
    return Material(
        source=f"the built-in world, {kind} edits",
        edits=tuple(edits),
        pool=tuple(others[:_POOL]),
        texts=tuple(islice(texts, _TEXTS)),
        questions=tuple(questions[:_QUESTIONS]),
    )


def draw_edits(edits: Sequence[Edit], count: int, seed: int, texts: Iterable[str], source: str, fits: Callable[[Edit], bool]) -> Material:
    """A stream of one's own edits, in an order of the seed's, no two of one slot. What is left over becomes the surroundings.

    A neighbour that names a subject of the stream is left out: it is not clear what it should answer then.

    Args:
        texts: passages of the corpus that the model must go on knowing.
        fits: whether the base can be asked about an edit.

    Raises:
        InputError: fewer edits than the stream needs.
    """
    distinct = list({edit.slot: edit for edit in edits if fits(edit)}.values())
    if len(distinct) < count:
        raise InputError(f"{source}: expected at least {count} edits that this base can be asked about, found {len(distinct)}")
    random.Random(f"comparison {seed}").shuffle(distinct)
    stream, rest = distinct[:count], distinct[count:]
    edited = {edit.subject_key for edit in stream}
    names = {edit.subject for edit in stream}
    spare = [edit for edit in rest if edit.subject_key not in edited]
    return Material(
        source=source,
        edits=tuple(_drop_touched(edit, names) for edit in stream),
        pool=tuple(spare[:_POOL]),
        texts=tuple(islice((text for text in texts if not any(name in text for name in names)), _TEXTS)),
        questions=tuple(_make_questions(spare, distinct, seed)),
    )


def _drop_touched(edit: Edit, names: set[str]) -> Edit:
    def keep(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        return tuple(probe for probe in probes if not any(name in probe.prompt for name in names))

    return edit.model_copy(update={"neighborhood_prompts": keep(edit.neighborhood_prompts)})


def _make_questions(edits: Sequence[Edit], every: Sequence[Edit], seed: int) -> list[AbilityQuestion]:
    """What is true of the subjects of `edits`, among what is true of others of the same relation."""
    truths: dict[str, list[str]] = {}
    for edit in every:
        truths.setdefault(str(edit.relation_id), []).extend([edit.target_true] if edit.target_true else [])
    draw = random.Random(f"comparison questions {seed}")
    questions = []
    for edit in edits:
        if not edit.target_true or not edit.relation_id:
            continue
        true = str(edit.target_true)
        others = sorted({other for other in truths[str(edit.relation_id)] if other != true})
        if len(others) >= _CHOICES - 1:
            choices = draw.sample([true, *draw.sample(others, _CHOICES - 1)], _CHOICES)
            questions.append(AbilityQuestion(question=edit.rewrite_prompt, choices=tuple(choices), answer=choices.index(true)))
    return questions[:_QUESTIONS]
