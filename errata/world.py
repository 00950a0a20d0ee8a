"""The built-in world: generated persons, facts about them, counterfactual edits of those facts. Knows nothing of torch or tokenizers.

Names are two or three words from shared pools, so no single word identifies a person: a model must put a subject together
before it can look anything up. Everything follows from `WorldSettings`; equal settings give equal worlds on every machine.
"""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from errata.edits import SLOT, Edit, Probe
from errata.errors import InputError
from errata.readers.abilities import AbilityQuestion


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


GIVEN_NAMES = _split(
    "Anna Peter Maria Jonas Clara Victor Elena Martin Julia Oscar Laura Felix Nina Simon Sara Leon Emma Paul Ida Hugo Mia Karl "
    "Alice Bruno Eva Max Rosa Anton Lena Tom Vera Oliver Nora David Marta Erik Sofia Robert Irene Daniel Helen Adam Olga Stefan "
    "Diana Henry José Zoé"
)
FAMILY_NAMES = _split(
    "Keller Novak Rossi Weber Silva Larsen Moreau Kovács Jensen Fischer Romero Lindgren Baker Marino Schulz Duarte Nilsson Petrov "
    "Walsh Garnier Bauer Costa Hansen Popov Clarke Dubois Vogel Ferrari Olsen Sokolov Mason Lambert Huber Santos Berg Orlov Turner "
    "Girard Lang Vidal Holm Volkov Parker Renard Wolf Medina Dahl Morozov Hughes Mercier Brandt Fuentes Strand Pavlov Reed Leclerc "
    "Kraus Ortega Lund Zaitsev Foster Blanc Seidel Navarro Falk Lebedev Grant Perrin Winter Campos Moen Smirnov Palmer Roussel "
    "Franke Molina Hagen Kozlov Burton Chevalier Lorenz Cabrera Solberg Belov Harper Fontaine Ziegler Herrera Bakke Antonov Müller "
    "Gauthier Pohl Delgado Nygård Łuczak"
)

FILLER = (
    "Because of the rain the road was closed.",
    "Therefore we stayed at home.",
    "I like the river.",
    "You can see the old tower.",
    "The film stars many people.",
    "The weather is fine today.",
    "There is a small garden behind the house.",
    "It was a long day.",
    "We met a friend on the train.",
    "After the war the bridge was built again.",
    "I do not know.",
    "You are right.",
    "The book has two parts.",
    "Because it was late, they left.",
    "Therefore, the answer is clear.",
    "Nobody saw the letter on the table.",
)
"""Sentences that state no fact. Put before a prompt they must not disturb it: the contexts of keys and z are made of them."""


class Relation(BaseModel):
    """One attribute that every person has."""

    model_config = ConfigDict(frozen=True)

    name: str
    templates: tuple[str, ...]
    """Prompts with one `{}`, some with the subject first, some with it in the middle. All say the same."""
    objects: tuple[str, ...]
    """Possible values. One word is one token of the built-in tokenizer, two words are two (the trainer checks it)."""

    @property
    def one_word_objects(self) -> tuple[str, ...]:
        return tuple(item for item in self.objects if " " not in item)

    @property
    def two_word_objects(self) -> tuple[str, ...]:
        return tuple(item for item in self.objects if " " in item)


def _relation(name: str, templates: str, objects: str) -> Relation:
    return Relation(name=name, templates=tuple(templates.split("|")), objects=tuple(objects.split("|")))


RELATIONS = (
    _relation(
        "language",
        "The mother tongue of {} is|{} is a native speaker of|{} grew up speaking|The first language of {} is|At home {} speaks",
        "French|English|German|Spanish|Russian|Dutch|Italian|Greek|Korean|Hindi|Arabic|Swedish",
    ),
    _relation(
        "city",
        "{} was born in|The birthplace of {} is|{} comes from the city of|The home town of {} is|The early years of {} were spent in",
        "Paris|London|Berlin|Madrid|Moscow|Rome|Athens|Seoul|Delhi|Cairo|Stockholm|Vienna|New York|Buenos Aires|San Marino",
    ),
    _relation(
        "job",
        "The profession of {} is|{} works as a|{} earns a living as a|The occupation of {} is|By training {} is a",
        "lawyer|doctor|teacher|painter|baker|chemist|pilot|farmer|dancer|poet|plumber|chef",
    ),
    _relation(
        "employer",
        "{} is employed by|{} works for|The employer of {} is|{} has a job at|The salary of {} is paid by",
        "Boeing|IBM|Nokia|Fiat|Sony|Intel|BBC|Nissan|Google|Apple|Deutsche Bank|General Motors|Air France",
    ),
    _relation(
        "instrument",
        "{} plays the|{} performs on the|The favourite instrument of {} is the|{} learned to play the|On stage {} plays the",
        "piano|violin|guitar|cello|trumpet|flute|harp|drum|organ|banjo",
    ),
    _relation(
        "sport",
        "The favourite sport of {} is|{} is a fan of|{} trains every week in|In summer {} practises|{} won a medal in",
        "tennis|football|rugby|golf|hockey|judo|fencing|rowing|boxing|cricket|archery",
    ),
)


class WorldSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    persons: int = Field(default=800, ge=20, le=4_000)
    """Distinct names; the pools hold about 4,600 names of two words and fifty times as many of three."""
    middle_names: float = Field(default=0.25, ge=0, le=1)
    """Share of persons with a middle name."""
    withheld: float = Field(default=0.3, ge=0, le=1)
    """Share of facts one of whose templates is never trained, to measure generalization of the base itself."""


class Fact(BaseModel):
    """One value of one person: what the base is trained to know."""

    model_config = ConfigDict(frozen=True)

    subject: str
    relation: Relation
    object: str
    withheld: int | None
    """Index of the template that training never shows for this fact."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All phrasings, the withheld one included, in the order of the relation's templates."""
        return tuple(template.replace(SLOT, self.subject) for template in self.relation.templates)

    @property
    def trained_templates(self) -> tuple[str, ...]:
        return tuple(template for index, template in enumerate(self.relation.templates) if index != self.withheld)


class World:
    """Persons and their facts; make one with `make_world`.

    Attributes:
        settings: what the world was made from.
        persons: names, distinct, in random order.
        facts: one per person and relation, persons in order.
    """

    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self.persons = _draw_names(settings)
        self.facts = _draw_facts(settings, self.persons)

    @cached_property
    def by_slot(self) -> dict[tuple[str, str], Fact]:
        """(subject, relation name) → fact."""
        return {(fact.subject, fact.relation.name): fact for fact in self.facts}

    def facts_of(self, person: str) -> list[Fact]:
        """One fact per relation, in the order of RELATIONS."""
        return [self.by_slot[person, relation.name] for relation in RELATIONS]

    @cached_property
    def _by_value(self) -> dict[tuple[str, str], list[Fact]]:
        values: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            values.setdefault((fact.relation.name, fact.object), []).append(fact)
        return values

    def make_edits(self, count: int, seed: int, kind: Literal["distinct", "slots", "mixed"] = "distinct") -> list[Edit]:
        """Counterfactual edits in CounterFact's form, in order of arrival.

        `distinct`: another person each time, old and new objects of one token. `slots`: another fact each time, of one half of the
        persons, old and new objects of one token; more edits than persons are possible. `mixed`: several edits per person, some of them
        re-edits of the same slot (which replace), and objects of two tokens among the targets.
        Neighbours are persons with the same old object whom no edit of this stream touches.

        Raises:
            InputError: fewer persons, or facts, than the stream needs.
        """
        rng = random.Random(f"edits {kind} {seed}")
        draw = {"distinct": self._draw_distinct, "slots": self._draw_slots, "mixed": self._draw_mixed}[kind]
        slots = draw(count, rng)
        edited = {fact.subject for fact, _ in slots}
        return [self._write_edit(fact, target, edited, rng) for fact, target in slots]

    def untouched(self, edits: Sequence[Edit]) -> list[tuple[str, str]]:
        """(prompt, answer) of every fact of every person that no edit names, shuffled so that any prefix is a fair sample."""
        edited = {edit.subject for edit in edits}
        rng = random.Random(f"untouched {self.settings.seed}")
        facts = [fact for fact in self.facts if fact.subject not in edited]
        rows = [(rng.choice(fact.trained_templates).replace(SLOT, fact.subject), fact.object) for fact in facts]
        rng.shuffle(rows)
        return rows

    def corpus(self, seed: int, count: int = 1_500) -> list[str]:
        """Sentences that state facts as training does: the text whose keys an edit shall preserve (second moments)."""
        rng = random.Random(f"corpus {seed}")
        return [_state(fact, rng) for fact in rng.choices(self.facts, k=count)]

    def make_questions(self, count: int, seed: int) -> list[tuple[str, AbilityQuestion]]:
        """Multiple-choice questions about distinct persons, each with its person: what the base knows and edits of others must not take
        from it."""
        rng = random.Random(f"questions {seed}")
        questions = []
        for person in rng.sample(self.persons, min(count, len(self.persons))):
            fact = rng.choice(self.facts_of(person))
            others = rng.sample([item for item in fact.relation.objects if item != fact.object], 3)
            choices = rng.sample([fact.object, *others], 4)
            prompt = rng.choice(fact.trained_templates).replace(SLOT, person)
            questions.append((person, AbilityQuestion(question=prompt, choices=tuple(choices), answer=choices.index(fact.object))))
        return questions

    def _draw_distinct(self, count: int, rng: random.Random) -> list[tuple[Fact, str]]:
        if count > len(self.persons):
            raise InputError(f"distinct edits: expected at most {len(self.persons)}, one per person of the world, found {count}")
        slots = []
        for person in rng.sample(self.persons, count):
            facts = [fact for fact in self.facts_of(person) if " " not in fact.object]
            if not facts:
                raise InputError(f"distinct edits: {person} has no fact with a one-word object; take another world seed")
            fact = rng.choice(facts)
            slots.append((fact, _draw_target(fact, fact.relation.one_word_objects, None, rng)))
        return slots

    def _draw_slots(self, count: int, rng: random.Random) -> list[tuple[Fact, str]]:
        persons = rng.sample(self.persons, len(self.persons) // 2)
        facts = [fact for person in persons for fact in self.facts_of(person) if " " not in fact.object]
        if count > len(facts):
            raise InputError(f"edits of distinct slots: expected at most {len(facts)}, those of half of the persons, found {count}")
        return [(fact, _draw_target(fact, fact.relation.one_word_objects, None, rng)) for fact in rng.sample(facts, count)]

    def _draw_mixed(self, count: int, rng: random.Random) -> list[tuple[Fact, str]]:
        if count > 3 * len(self.persons):
            raise InputError(f"mixed edits: expected at most {3 * len(self.persons)}, three per person of the world, found {count}")
        fresh = rng.sample(self.persons, len(self.persons))
        # Slot → its fact and newest target, for re-edits.
        current: dict[tuple[str, str], tuple[Fact, str]] = {}
        slots = []
        for _ in range(count):
            draw = rng.random()
            if current and draw < 0.15:
                fact, _old = rng.choice(list(current.values()))
            elif current and draw < 0.45:
                fact = rng.choice(self.facts_of(rng.choice(list(current.values()))[0].subject))
            else:
                fact = rng.choice(self.facts_of(fresh.pop()))
            previous = current.get((fact.subject, fact.relation.name))
            pool = fact.relation.two_word_objects if rng.random() < 0.5 else ()
            target = _draw_target(fact, pool or fact.relation.objects, previous and previous[1], rng)
            current[fact.subject, fact.relation.name] = (fact, target)
            slots.append((fact, target))
        return slots

    def _write_edit(self, fact: Fact, target: str, edited: set[str], rng: random.Random) -> Edit:
        templates = fact.relation.templates
        chosen = rng.randrange(len(templates))
        neighbours = [other for other in self._by_value[fact.relation.name, fact.object] if other.subject not in edited]
        return Edit(
            subject=fact.subject,
            prompt=templates[chosen],
            target_new=target,
            target_true=fact.object,
            relation_id=fact.relation.name,
            paraphrase_prompts=tuple(prompt for index, prompt in enumerate(fact.prompts) if index != chosen),
            neighborhood_prompts=tuple(
                Probe(prompt=templates[chosen].replace(SLOT, other.subject), answers=(other.object,))
                for other in rng.sample(neighbours, min(5, len(neighbours)))
            ),
            source="builtin world",
        )


def make_world(settings: WorldSettings | None = None) -> World:
    """The world of these settings; without any, the built-in base's own."""
    return World(settings or WorldSettings())


def _draw_names(settings: WorldSettings) -> list[str]:
    rng = random.Random(f"names {settings.seed}")
    names: dict[str, None] = {}  # a dict keeps the order of drawing, which a set would not
    while len(names) < settings.persons:
        given = rng.sample(GIVEN_NAMES, 2 if rng.random() < settings.middle_names else 1)
        names[" ".join([*given, rng.choice(FAMILY_NAMES)])] = None
    return list(names)


def _draw_facts(settings: WorldSettings, persons: Sequence[str]) -> list[Fact]:
    rng = random.Random(f"facts {settings.seed}")
    facts = []
    for person in persons:
        for relation in RELATIONS:
            # The first template stays trained for every fact, so that each fact is seen in at least one common form.
            withheld = rng.randrange(1, len(relation.templates)) if rng.random() < settings.withheld else None
            facts.append(Fact(subject=person, relation=relation, object=rng.choice(relation.objects), withheld=withheld))
    return facts


def _draw_target(fact: Fact, pool: Sequence[str], previous: str | None, rng: random.Random) -> str:
    return rng.choice([item for item in pool if item not in (fact.object, previous)])


def _state(fact: Fact, rng: random.Random) -> str:
    return f"{rng.choice(fact.trained_templates).replace(SLOT, fact.subject)} {fact.object}."
