"""Facts to calibrate with: edits whose old answer the model may know, found by asking it (algorithms.md, resolutions B and G)."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from errata.calibration.common_facts import COMMON_FACTS, TEMPLATES
from errata.edits import SLOT, Edit, Probe
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import Progress, Question, score_targets
from errata.modeling.loading import Base
from errata.modeling.tokens import can_write

ENOUGH = 12
"""Facts the model must know before their trace is believed."""
_NEIGHBOURS = 5
_SPARED = 20
"""Countries that are nobody's subject."""


@dataclass(frozen=True)
class Asked:
    """What became of the facts a model was asked for."""

    known: tuple[Edit, ...]
    """Those whose target_true is the model's own answer, every token of it."""
    unknown: tuple[Edit, ...]
    unwritable: int
    """Facts whose old or new answer the tokenizer cannot write."""


def make_common_edits(seed: int) -> list[Edit]:
    """Counterfactual edits of facts that most general models know, one per country. Which countries, and in what order, `seed` draws;
    neighbours are those that are left, first those with the same answer."""
    rng = random.Random(f"common facts {seed}")
    countries = rng.sample(sorted(COMMON_FACTS), len(COMMON_FACTS))
    spared, edited = countries[:_SPARED], countries[_SPARED:]
    edits = []
    for country in edited:
        relation = rng.choice(sorted(TEMPLATES))
        old = COMMON_FACTS[country][relation]
        prompt, *others = rng.sample(TEMPLATES[relation], len(TEMPLATES[relation]))
        near = sorted(spared, key=lambda name: COMMON_FACTS[name][relation] != old)[:_NEIGHBOURS]
        edits.append(
            Edit(
                subject=country,
                prompt=prompt,
                target_new=rng.choice(sorted({facts[relation] for facts in COMMON_FACTS.values()} - {old})),
                target_true=old,
                relation_id=relation,
                paraphrase_prompts=tuple(other.replace(SLOT, country) for other in others),
                neighborhood_prompts=tuple(
                    Probe(prompt=prompt.replace(SLOT, name), answers=(COMMON_FACTS[name][relation],)) for name in near
                ),
                source="errata's common facts",
            )
        )
    return edits


def take_distinct(edits: Iterable[Edit], most: int) -> list[Edit]:
    """The first `most` edits of distinct subjects: several of one subject share a key, which is another question."""
    distinct: dict[str, Edit] = {}
    for edit in edits:
        if len(distinct) == most:
            break
        distinct.setdefault(edit.subject_key, edit)
    return list(distinct.values())


def ask_facts(base: Base, edits: Sequence[Edit], batch_tokens: int, progress: Progress | None = None) -> Asked:
    """Which of the edits' old answers the model gives, teacher forced, every token of target_true being its first choice.

    Edits without a target_true are among the unknown.
    """
    writable = [
        edit
        for edit in edits
        if can_write(base.tokenizer, edit.target_new) and (edit.target_true is None or can_write(base.tokenizer, edit.target_true))
    ]
    questions: dict[str, Question] = {edit.edit_id: (edit.rewrite_prompt, edit.target_true) for edit in writable if edit.target_true}
    scored = score_targets(base, questions.values(), batch_tokens=batch_tokens, stage="facts", progress=progress)
    right = {name for name, question in questions.items() if all_correct(scored[question].chosen, scored[question].target)}
    return Asked(
        known=tuple(edit for edit in writable if edit.edit_id in right),
        unknown=tuple(edit for edit in writable if edit.edit_id not in right),
        unwritable=len(edits) - len(writable),
    )
