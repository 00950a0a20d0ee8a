"""What edits that were taken back answer now, beside what the base answers."""

from collections.abc import Sequence

from errata.edits import Edit
from errata.evaluation.generation import generate_answers
from errata.evaluation.metrics import agreement
from errata.evaluation.scoring import Question, score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import Attachable, attach
from errata.report import Mean, Withdrawal, WithdrawnRow
from errata.settings import EvaluateSettings


def measure_consistency(base: Base, artifacts: Sequence[Attachable], withdrawn: Sequence[Edit], settings: EvaluateSettings) -> Withdrawal:
    """Ask the prompts of withdrawn edits on the base and on `base + artifacts`.

    Raises:
        BaseMismatchError: an artifact is not for this base.
        EditorError: the artifacts cannot be attached, since a weight would not be finite.
    """
    before, answers_before = _ask(base, withdrawn, settings)
    with attach(base, artifacts):
        after, answers_after = _ask(base, withdrawn, settings)
    rows = tuple(
        WithdrawnRow(id=edit.edit_id, consistent=agreement(now, was) == 1.0, greedy=answer == known, answer_base=known, answer=answer)
        for edit, was, now, known, answer in zip(withdrawn, before, after, answers_before, answers_after, strict=True)
    )
    return Withdrawal(
        rows=rows,
        consistency=Mean.over([float(row.consistent)] for row in rows),
        greedy_consistency=Mean.over([float(row.greedy)] for row in rows),
    )


def _ask(base: Base, edits: Sequence[Edit], settings: EvaluateSettings) -> tuple[list[tuple[int, ...]], list[str]]:
    """Per edit the argmax at each token of its target_new, and the greedy answer, of the model as it is now."""
    questions: list[Question] = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
    scored = score_targets(base, questions, batch_tokens=settings.batch_tokens)
    prompts = [edit.rewrite_prompt for edit in edits]
    answers = generate_answers(base, prompts, max_new_tokens=settings.max_new_tokens, batch_tokens=settings.batch_tokens)
    return [scored[question].chosen for question in questions], answers
