"""How far a student is from its teacher: KL over the whole vocabulary, or over the likeliest tokens and one bucket for all others."""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Distribution:
    """What a teacher predicts at n positions."""

    logprobs: torch.Tensor
    """[n, vocabulary] float32, or [n, k + 1]: of `ids`, and of all other tokens together."""
    ids: torch.Tensor | None = None
    """[n, k] int64 where only the likeliest tokens are kept."""


def soften(logits: torch.Tensor, temperature: float, top_k: int | None) -> Distribution:
    """Log-probabilities of logits [n, vocabulary] at a temperature; of the `top_k` likeliest tokens and of the remainder, unless they are
    all there are."""
    logprobs = functional.log_softmax(logits.float() / temperature, dim=-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return Distribution(logprobs)
    ids = logprobs.topk(top_k, dim=-1).indices
    return Distribution(gather_buckets(logprobs, ids), ids)


def gather_buckets(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, k + 1] of the tokens `ids` [n, k] and of all others [n, vocabulary] together."""
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], dim=-1)


def diverge(teacher: Distribution, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher ‖ student) [n] in nats, summed over the vocabulary of each position (resolution K). With buckets it is at most that of the
    whole vocabulary: merging outcomes only loses information (data processing inequality).

    Args:
        logits: of the student [n, vocabulary].
    """
    student = functional.log_softmax(logits.float() / temperature, dim=-1)
    if teacher.ids is not None:
        student = gather_buckets(student, teacher.ids)
    return functional.kl_div(student, teacher.logprobs, reduction="none", log_target=True).sum(dim=-1)
