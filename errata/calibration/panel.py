"""What every trial of a calibration is asked, whatever wrote the edits: their prompts, paraphrases and neighbours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from errata.editors.artifacts import Artifact
from errata.edits import Edit
from errata.evaluation.metrics import agreement, all_correct, harmonic_mean
from errata.evaluation.scoring import Question, Scored, score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.tokens import can_write


class Answers(NamedTuple):
    """How a base with an artifact answers a panel."""

    efficacy: float
    """Over all edits; one whose target the tokenizer cannot write counts as failed."""
    generalization: float | None
    """Over all paraphrases; None where the edits have none."""
    specificity: float | None
    """Agreement with the base over all neighbours; None where the edits have none."""
    score: float
    """Harmonic mean of those three that there are."""


@dataclass(frozen=True)
class Panel:
    """The questions about some edits, and what the base said before any of them."""

    base: Base
    edits: tuple[Edit, ...]
    batch_tokens: int

    def ask(self, artifact: Artifact) -> Answers:
        """Attach an artifact, ask everything, and take it off."""
        questions = [*self._rewrites.values(), *(q for group in self._paraphrases.values() for q in group), *self._neighbours]
        with attach(self.base, [artifact]):
            after = score_targets(self.base, questions, batch_tokens=self.batch_tokens)
        efficacy = _share(_said(after[question]) for question in self._rewrites.values())
        general = _share_or_none([_said(after[question]) for group in self._paraphrases.values() for question in group])
        kept = [agreement(after[question].chosen, self._before[question].chosen) for question in self._neighbours]
        specificity = _share_or_none(kept)
        asked = len(self._rewrites) / len(self.edits)
        values = [value for value in (efficacy * asked, general, specificity) if value is not None]
        return Answers(efficacy * asked, general, specificity, harmonic_mean(values) or 0.0)

    @cached_property
    def _rewrites(self) -> dict[str, Question]:
        written = [edit for edit in self.edits if can_write(self.base.tokenizer, edit.target_new)]
        return {edit.edit_id: (edit.rewrite_prompt, edit.target_new) for edit in written}

    @cached_property
    def _paraphrases(self) -> dict[str, list[Question]]:
        return {
            edit.edit_id: [(prompt, edit.target_new) for prompt in edit.paraphrase_prompts]
            for edit in self.edits
            if edit.edit_id in self._rewrites
        }

    @cached_property
    def _neighbours(self) -> list[Question]:
        """With the first answer that can be written forced, or only the token after the prompt."""
        return [
            (probe.prompt, next((answer for answer in probe.answers if can_write(self.base.tokenizer, answer)), None))
            for edit in self.edits
            for probe in edit.neighborhood_prompts
        ]

    @cached_property
    def _before(self) -> Mapping[Question, Scored]:
        return score_targets(self.base, self._neighbours, batch_tokens=self.batch_tokens)


def _said(scored: Scored) -> float:
    return float(all_correct(scored.chosen, scored.target))


def _share(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _share_or_none(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
