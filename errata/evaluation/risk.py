"""What edits cost, foretold on the base before anything is written: see `errata.edits.Risk`."""

from collections.abc import Sequence

from errata.edits import Edit, Risk
from errata.evaluation.scoring import Progress, score_targets
from errata.modeling.loading import Base


def measure_risks(base: Base, edits: Sequence[Edit], *, batch_tokens: int, progress: Progress | None = None) -> dict[str, Risk]:
    """Edit id → its risk, from one pass over the rewrite prompts.

    Args:
        base: untouched: call it outside of `attach`.

    Raises:
        TokenizationError: a target_new that the tokenizer cannot write.
    """
    questions = {edit.edit_id: (edit.rewrite_prompt, edit.target_new) for edit in edits}
    scored = score_targets(base, questions.values(), batch_tokens=batch_tokens, stage="risk", progress=progress)
    return {edit_id: Risk.over(scored[question].logprobs) for edit_id, question in questions.items()}
