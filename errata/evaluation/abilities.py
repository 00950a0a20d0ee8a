"""Multiple choice by likelihood: whether the model as it is now prefers the right continuation (design §6)."""

from collections.abc import Sequence

from errata.evaluation.metrics import mean_loss
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.readers.abilities import AbilityQuestion
from errata.report import Mean


def measure_ability(base: Base, questions: Sequence[AbilityQuestion], *, batch_tokens: int) -> Mean:
    """Share of questions whose right choice has the least loss per token; a tie with another choice is no success.

    The loss is normalised by length in tokens, as in lm-evaluation-harness's `acc_norm` (there by bytes): choices of one set differ in
    length, and the longer would lose otherwise.

    Raises:
        TokenizationError: a choice that the tokenizer cannot write.
    """
    asked = [(item.question, choice) for item in questions for choice in item.choices]
    scored = score_targets(base, asked, batch_tokens=batch_tokens, stage="abilities")
    right = []
    for item in questions:
        losses = [mean_loss(scored[item.question, choice].logprobs) for choice in item.choices]
        others = [loss for place, loss in enumerate(losses) if place != item.answer]
        right.append([float(losses[item.answer] < min(others))])
    return Mean.over(right)
