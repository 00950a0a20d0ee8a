"""Measuring a champion that has been serving for a while: norms, distance from the base, what is still known (design §7)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errata.editors.artifacts import Artifact
from errata.edits import Edit
from errata.evaluation.abilities import measure_ability
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.monitors.locality import find_perplexity, measure_locality, read_probe
from errata.monitors.norms import measure_norms
from errata.readers.abilities import AbilityQuestion
from errata.report import Locality, Mean, WeightNorms


@dataclass(frozen=True)
class Checkup:
    """What a champion is like now."""

    norms: tuple[WeightNorms, ...]
    retained: tuple[bool, ...]
    """Of each edit that was asked about: every token of target_new is the argmax, teacher forced."""
    locality: Locality
    perplexity_base: float | None
    perplexity: float | None
    ability: tuple[Mean, Mean]
    """Of the base and of the champion."""


def check_champion(
    base: Base,
    artifacts: Sequence[Artifact],
    conditions: Mapping[str, float],
    edits: Sequence[Edit],
    questions: Sequence[AbilityQuestion],
    probe_texts: Sequence[str],
    batch_tokens: int,
) -> Checkup:
    """Measure `base + artifacts`.

    Args:
        conditions: parameter name → condition number of the solve.
        edits: a sample of the live ones.
        questions: an ability set; may be empty.
        probe_texts: the fixed probe of locality and perplexity.

    Raises:
        BaseMismatchError: an artifact is not for this base.
        EditorError: an artifact cannot be attached.
        TokenizationError: an answer that the tokenizer cannot write.
    """
    reference, before = read_probe(base, probe_texts), measure_ability(base, questions, batch_tokens=batch_tokens)
    with attach(base, artifacts):
        asked = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
        scored = score_targets(base, asked, batch_tokens=batch_tokens, stage="retention")
        locality = measure_locality(base, reference)
        perplexity = find_perplexity(read_probe(base, probe_texts))
        after = measure_ability(base, questions, batch_tokens=batch_tokens)
    deltas = {name: delta for artifact in artifacts for name, delta in artifact.deltas.items()}
    return Checkup(
        norms=measure_norms(base, deltas, {name: value for name, value in conditions.items() if math.isfinite(value)}),
        retained=tuple(all_correct(scored[question].chosen, scored[question].target) for question in asked),
        locality=locality,
        perplexity_base=find_perplexity(reference),
        perplexity=perplexity,
        ability=(before, after),
    )
