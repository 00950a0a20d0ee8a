"""Which real facts a small base is to know, and which of them become edits: T-REx facts in ParaRel's patterns, for CounterFact's records.

ParaRel: Elazar et al., 2021, arXiv 2102.01017; T-REx: Elsahar et al., LREC 2018; CounterFact: Meng et al., 2022, arXiv 2202.05262.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.comparison.method import SPLIT_SEED
from errata.edits import SLOT, Edit, Submission, digest_subject
from errata.errors import InputError
from errata.evaluation.probes import split_probes
from errata.readers.files import read_edits
from errata.world import Fact, Relation

TEMPLATES = 4
"""Of each relation at most: an edit's prompt and its paraphrases, one of which is withheld from training."""
FEWEST = 3
"""Fewer would leave a prompt without a trained or without a withheld paraphrase."""
NEIGHBOURS = 5
"""Of an edit: facts of the same relation with the same true object, whose subjects no edit touches."""
LONGEST = 40
"""Characters of a name. A few longer ones would lengthen every row of the training."""


@dataclass(frozen=True)
class Choice:
    """What a base is trained on, and what would be edited there."""

    facts: list[Fact]
    """At most one per subject and relation."""
    edits: list[Edit]
    """Of distinct (subject, relation), without neighbours; the truth of each is among `facts`, its held-out paraphrase withheld there."""

    def corpus(self, seed: int) -> list[str]:
        """Every fact once, as training states it, shuffled: the text whose keys an edit shall preserve (second moments)."""
        rng = random.Random(f"corpus {seed}")
        shuffled = rng.sample(self.facts, len(self.facts))
        return [f"{rng.choice(fact.trained_templates).replace(SLOT, fact.subject)} {fact.object}." for fact in shuffled]

    def list_neighbours(self) -> dict[tuple[str, str], list[Fact]]:
        """(relation, object) → facts whose subjects no edit touches."""
        edited = {edit.subject_key for edit in self.edits}
        near: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            if digest_subject(fact.subject) not in edited:
                near.setdefault((fact.relation.name, fact.object), []).append(fact)
        return near


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one of ParaRel's files."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: expected a JSON object, found a fault ({error})") from None


def open_pattern(pattern: str) -> str | None:
    """ParaRel's `[X] … [Y].` as a prompt with one `{}`; None where more than a full stop follows the object, or the subject is missing."""
    text = " ".join(pattern.split()).removesuffix(".").strip()
    prompt = text.removesuffix("[Y]")
    if prompt == text or "[Y]" in prompt or prompt.count("[X]") != 1 or SLOT in prompt:
        return None
    return prompt.replace("[X]", SLOT).strip()


def read_patterns(folder: Path) -> dict[str, list[str]]:
    """Relation → prompts, in the order of the file.

    Raises:
        InputError: there are none.
    """
    patterns = {}
    for path in sorted(folder.glob("P*.jsonl")):
        prompts = (open_pattern(record["pattern"]) for record in read_lines(path))
        patterns[path.stem] = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not patterns:
        raise InputError(f"{folder}: expected ParaRel's patterns (P*.jsonl), found none")
    return patterns


def read_truths(folder: Path) -> dict[str, dict[str, str]]:
    """Relation → subject → object. Subjects with several objects are left out: no prompt tells which one is meant.

    Raises:
        InputError: there are none.
    """
    truths: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("P*.jsonl")):
        objects: dict[str, set[str]] = {}
        for record in read_lines(path):
            objects.setdefault(record["sub_label"], set()).add(record["obj_label"])
        truths[path.stem] = {subject: found.pop() for subject, found in objects.items() if len(found) == 1 and SLOT not in subject}
    if not truths:
        raise InputError(f"{folder}: expected T-REx facts (P*.jsonl), found none")
    return truths


def read_records(path: Path) -> list[Edit]:
    """CounterFact's records that say which relation they are about and what is true."""
    found = [record.edit for record in read_edits(path) if isinstance(record, Submission)]
    return [edit for edit in found if edit.relation_id and edit.target_true]


def choose_templates(patterns: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """At most TEMPLATES: ParaRel's, those first that CounterFact uses most; where ParaRel has too few, CounterFact's own.

    None of them begins with another: "{} plays" would be trained to end in an instrument and to go on with "the".

    Args:
        patterns: ParaRel's, of one relation.
        prompts: of CounterFact's records of that relation, one per record.
    """
    used = Counter(prompts)
    chosen: list[str] = []
    for template in (*sorted(patterns, key=lambda template: -used[template]), *(template for template, _ in used.most_common())):
        if not any(_begins(template, other) or _begins(other, template) for other in chosen):
            chosen.append(template)
    return chosen[:TEMPLATES]


def _begins(text: str, other: str) -> bool:
    """Whether `text` is the beginning of `other`, word by word."""
    return f"{other} ".casefold().startswith(f"{text} ".casefold())


class _Chooser:
    """Facts taken so far; a fact is refused whose question has another answer already."""

    def __init__(self, templates: Mapping[str, list[str]], limit: int) -> None:
        self.templates, self.limit = templates, limit
        self.taken: dict[tuple[str, str], str] = {}
        """(relation, subject) → object."""
        self._asked: dict[str, dict[str, str]] = {}
        """Subject → template → object."""

    @property
    def is_full(self) -> bool:
        return len(self.taken) >= self.limit

    def take(self, relation: str, subject: str, item: str) -> bool:
        """Whether the fact is among those taken now."""
        if (relation, subject) in self.taken:
            return self.taken[relation, subject] == item
        if self.is_full or relation not in self.templates or len(subject) > LONGEST:
            return False
        asked = self._asked.setdefault(subject.casefold(), {})
        for template in self.templates[relation]:
            for other, answer in asked.items():
                if answer != item and (_begins(template, other) or _begins(other, template)):
                    return False
        asked |= dict.fromkeys(self.templates[relation], item)
        self.taken[relation, subject] = item
        return True


def choose_facts(
    patterns: Mapping[str, Sequence[str]], truths: Mapping[str, Mapping[str, str]], records: Sequence[Edit], count: int, seed: int
) -> Choice:
    """About `count` facts: half of them of records at most, then neighbours of these, then whatever else is known of the same subjects,
    then more neighbours.

    Args:
        patterns: `read_patterns`.
        truths: `read_truths`.
        records: `read_records`; of one subject and relation the first counts.
        seed: of what is withheld of facts that no edit is about, and of prompts where a record's own is not among the templates.
    """
    rng = random.Random(f"facts {seed}")
    prompts: dict[str, list[str]] = {}
    for record in records:
        prompts.setdefault(str(record.relation_id), []).append(record.prompt)
    templates = {name: choose_templates(patterns.get(name, ()), prompts.get(name, ())) for name in truths}
    templates = {name: found for name, found in templates.items() if len(found) >= FEWEST}
    chooser = _Chooser(templates, count // 2)
    edits: dict[str, Edit] = {}
    for record in records:
        relation, true = str(record.relation_id), str(record.target_true)
        if record.slot in edits or truths.get(relation, {}).get(record.subject) != true:
            continue
        if record.target_new in truths[relation].values() and chooser.take(relation, record.subject, true):
            edits[record.slot] = _rewrite(record, templates[relation], rng)
    chooser.limit = count
    _take_neighbours(chooser, truths, list(edits.values()), records, rng)
    return _write_choice(chooser, list(edits.values()), rng)


def _rewrite(record: Edit, templates: Sequence[str], rng: random.Random) -> Edit:
    """The record in the templates of its relation: its own prompt where that is one of them, all others as paraphrases."""
    prompt = record.prompt if record.prompt in templates else rng.choice(templates)
    return Edit(
        subject=record.subject,
        prompt=prompt,
        target_new=record.target_new,
        target_true=record.target_true,
        relation_id=record.relation_id,
        paraphrase_prompts=tuple(template.replace(SLOT, record.subject) for template in templates if template != prompt),
        source="CounterFact in ParaRel's patterns",
        note=record.note,
    )


def _take_neighbours(
    chooser: _Chooser, truths: Mapping[str, Mapping[str, str]], edits: Sequence[Edit], records: Sequence[Edit], rng: random.Random
) -> None:
    listed = Counter(probe.prompt for record in records for probe in record.neighborhood_prompts)
    edited = {edit.subject_key for edit in edits}
    wanted = Counter((str(edit.relation_id), str(edit.target_true)) for edit in edits)
    asked = {(str(record.relation_id), record.prompt) for record in records}
    uses: Counter[tuple[str, str]] = Counter()
    for relation, prompt in asked:
        for subject in truths.get(relation, ()):
            uses[relation, subject] += listed[prompt.replace(SLOT, subject)]
    waiting: dict[tuple[str, str], list[str]] = {group: [] for group, _ in wanted.most_common()}
    for relation, known in truths.items():
        for subject, item in rng.sample(list(known.items()), len(known)):
            if (relation, item) in waiting and digest_subject(subject) not in edited:
                waiting[relation, item].append(subject)
    for (relation, _), subjects in waiting.items():
        subjects.sort(key=lambda subject: -uses[relation, subject])

    def deal(rounds: int) -> None:
        for _ in range(rounds):
            for (relation, item), subjects in waiting.items():
                while subjects and not chooser.take(relation, subjects.pop(0), item):
                    pass

    deal(NEIGHBOURS)
    for subject in dict.fromkeys(subject for _, subject in list(chooser.taken)):
        for relation, known in truths.items():
            if subject in known:
                chooser.take(relation, subject, known[subject])
    while any(waiting.values()) and not chooser.is_full:
        deal(1)


def _write_choice(chooser: _Chooser, edits: Sequence[Edit], rng: random.Random) -> Choice:
    objects: dict[str, list[str]] = {}
    for (relation, _), item in chooser.taken.items():
        objects.setdefault(relation, []).append(item)
    relations = {
        name: Relation(name=name, templates=tuple(chooser.templates[name]), objects=tuple(dict.fromkeys(found)))
        for name, found in objects.items()
    }
    # What no fact ends in was never said by the base: not to be asked of an edit.
    kept = [edit for edit in edits if edit.target_new in relations[str(edit.relation_id)].objects]
    withheld = {(str(edit.relation_id), edit.subject): _find_withheld(edit, relations[str(edit.relation_id)]) for edit in kept}
    facts = []
    for (name, subject), item in chooser.taken.items():
        relation = relations[name]
        index = withheld.get((name, subject), rng.randrange(len(relation.templates)))
        facts.append(Fact(subject=subject, relation=relation, object=item, withheld=index))
    return Choice(facts, kept)


def _find_withheld(edit: Edit, relation: Relation) -> int:
    """The template that evaluation holds out of all training."""
    (held,) = split_probes(edit, SPLIT_SEED).held_out.paraphrases
    return [template.replace(SLOT, edit.subject) for template in relation.templates].index(held)
