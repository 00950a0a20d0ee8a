"""Which edits a model needs no editing for."""

from collections.abc import Sequence

from errata.edits import Edit
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import Progress, Question, score_targets
from errata.modeling.loading import Base
from errata.modeling.tokens import can_write


def find_answered(base: Base, edits: Sequence[Edit], batch_tokens: int, progress: Progress | None = None) -> list[Edit]:
    """The edits whose whole target is the model's choice already, token by token, as it is now.

    One whose target the tokenizer cannot write is not among them.
    """
    questions: dict[str, Question] = {
        edit.edit_id: (edit.rewrite_prompt, edit.target_new) for edit in edits if can_write(base.tokenizer, edit.target_new)
    }
    scored = score_targets(base, questions.values(), batch_tokens=batch_tokens, stage="base", progress=progress)
    found = {edit_id: scored[question] for edit_id, question in questions.items()}
    return [edit for edit in edits if edit.edit_id in found and all_correct(found[edit.edit_id].chosen, found[edit.edit_id].target)]
