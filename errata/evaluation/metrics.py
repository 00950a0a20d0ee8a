"""The field's metrics as pure functions of token probabilities (algorithms.md, Part 4). Knows nothing of models or files.

A prompt's *loss* s(o) is the mean negative log-probability per token of the object o after the prompt, teacher forced. Means over
prompts and edits are taken by `errata.report.Mean`.
"""

import math
from collections.abc import Sequence


def mean_loss(logprobs: Sequence[float]) -> float:
    """s(o): mean negative log-probability per target token, in nats.

    Source: CounterFact, kmeng01/memit experiments/py/eval_utils_counterfact.py (test_batch_prediction).
    """
    if not logprobs:
        raise ValueError("expected the log-probabilities of at least one target token, found none")
    return -sum(logprobs) / len(logprobs)


def prefers(wanted: Sequence[float], other: Sequence[float]) -> bool:
    """Success of one prompt: s(wanted) < s(other), strictly.

    ES and PS want target_new rather than target_true; NS wants the true answer rather than target_new.
    Source: kmeng01/memit experiments/summarize.py. Its `a > b` on losses is the same strict comparison; a tie is no success.
    """
    return mean_loss(wanted) < mean_loss(other)


def magnitude(wanted: Sequence[float], other: Sequence[float]) -> float:
    """exp(−s(wanted)) − exp(−s(other)): the difference of geometric-mean token probabilities (EM, PM; NM with the roles exchanged).

    Source: kmeng01/memit experiments/summarize.py; equals 1/perplexity differences in IKE and MIKE.
    """
    return math.exp(-mean_loss(wanted)) - math.exp(-mean_loss(other))


def all_correct(chosen: Sequence[int], target: Sequence[int]) -> bool:
    """Strict accuracy: every target token is the argmax at its position, given the target's earlier tokens.

    Equal to greedy decoding reproducing the target, token by token. Source: the `acc` variant of memit's CounterFact evaluation.
    """
    _require_tokens(chosen, target)
    return all(a == b for a, b in zip(chosen, target, strict=True))


def token_accuracy(chosen: Sequence[int], target: Sequence[int]) -> float:
    """Share of target tokens that are the argmax at their position.

    zsRE's accuracy (kmeng01/memit experiments/py/eval_utils_zsre.py) on the target's own ids: that code decodes and re-encodes each
    token, which breaks with tokenizers that add a BOS. The same formula against the true answer is zsRE's specificity, whose ceiling
    is the base's own accuracy and not 1.
    """
    _require_tokens(chosen, target)
    return sum(a == b for a, b in zip(chosen, target, strict=True)) / len(target)


def agreement(chosen: Sequence[int], base_chosen: Sequence[int]) -> float:
    """Share of answer positions where the argmax is still the base's.

    EasyEdit's locality, and what D4S's code reports as specificity: the truth only supplies the answer's length (EasyEdit #308).
    """
    return token_accuracy(chosen, base_chosen)


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """The score of ROME, MEMIT and MIKE over efficacy, generalization and specificity. None if any of them is undefined; 0 if one is 0.

    iReVa and D4S publish arithmetic means under the same name: do not compare.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if min(known) <= 0:
        return 0.0
    return len(known) / sum(1 / value for value in known)


def _require_tokens(chosen: Sequence[int], target: Sequence[int]) -> None:
    if not target or len(chosen) != len(target):
        raise ValueError(f"expected as many chosen tokens as target tokens and at least one, found {len(chosen)} and {len(target)}")
