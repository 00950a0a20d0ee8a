"""Teacher-forced scoring: the probability of a given continuation, token by token, for many prompts at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from errata.modeling.beside import predict_at
from errata.modeling.loading import Base
from errata.modeling.queries import encode_queries
from errata.modeling.tokens import encode_target, find_pad, pad_rows

Question = tuple[str, str | None]
"""A prompt and the target to force after it. Without a target only the token right after the prompt is looked at."""
Progress = Callable[[str, int, int], None]
"""Called with the stage, the questions done and the questions in all."""

_HEAD_ROWS = 256
"""Positions whose logits are held at once: with a vocabulary of 50,000 they take 50 MB."""


@dataclass(frozen=True)
class Scored:
    """What the model thinks of one question."""

    target: tuple[int, ...]
    """Token ids of the target; empty without one."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each target token given the prompt and the target's earlier tokens; −inf where not finite."""
    chosen: tuple[int, ...]
    """The argmax at each of these positions (at one position without a target); −1, which no token is, where logits are not finite."""

    @property
    def finite(self) -> bool:
        return -1 not in self.chosen


@torch.inference_mode()
def score_targets(
    base: Base, questions: Iterable[Question], *, batch_tokens: int, stage: str = "score", progress: Progress | None = None
) -> dict[Question, Scored]:
    """Score every distinct question under the model as it is now.

    Questions that feed the same tokens and are read at the same positions (one prompt, several targets of one token) share a row. Rows
    are sorted by length and padded on the right in batches of at most `batch_tokens` padded tokens (one row at least). The body runs once
    per batch and the head only at target positions; the result equals full logits of each question alone up to rounding. A prompt longer
    than the context loses its beginning.

    What stands beside an MLP (`errata.modeling.beside`) is active at the target positions, each of which was the last token when a
    decoder came by: one pass is what decoding the target with a KV cache is.

    Raises:
        TokenizationError: a target that the tokenizer cannot write.
    """
    distinct = list(dict.fromkeys(questions))
    readings: dict[_Row, list[_Reading]] = {}
    for question, (row, target) in zip(distinct, encode_questions(base, distinct), strict=True):
        readings.setdefault((row, max(len(target), 1)), []).append((question, target))
    rows = sorted(readings, key=lambda row: len(row[0]))
    found: dict[Question, Scored] = {}
    for batch in split_by_tokens([len(ids) for ids, _ in rows], batch_tokens):
        fed = [rows[place] for place in batch]
        found.update(_score_batch(base, fed, [readings[row] for row in fed]))
        if progress:
            progress(stage, len(found), len(distinct))
    return {question: found[question] for question in distinct}


@torch.inference_mode()
def score_rows(base: Base, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Scored]:
    """Score rows of ids, (what is fed, the target) as `encode_questions` spells them, in one batch. Active positions come in the order of
    the rows, one after the other.

    Args:
        rows: each with a target of one token or more.
    """
    readings: list[list[_Reading]] = [[((str(index), None), target)] for index, (_, target) in enumerate(rows)]
    scored = _score_batch(base, [(row, len(target)) for row, target in rows], readings)
    return [scored[question] for ((question, _),) in readings]


def split_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[range]:
    """Consecutive ranges of rows, ascending in length, whose padded size stays within `batch_tokens`."""
    first = 0
    for place, length in enumerate(lengths):
        if place > first and (place + 1 - first) * length > batch_tokens:
            yield range(first, place)
            first = place
    if lengths:
        yield range(first, len(lengths))


_Row = tuple[tuple[int, ...], int]
"""Token ids to feed, and at how many positions, the last ones, they are read."""
_Reading = tuple[Question, tuple[int, ...]]
"""A question and its target's token ids, to be read off a row that is fed."""


def encode_questions(base: Base, questions: Sequence[Question]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each question the row to feed, and the target ids. The target's last token is predicted, never fed."""
    targets = [tuple(encode_target(base.tokenizer, target)) if target is not None else () for _, target in questions]
    prompts = list(dict.fromkeys(prompt for prompt, _ in questions))
    fed = dict(zip(prompts, encode_queries(base, prompts, 0), strict=True))
    rows = ((*fed[prompt], *wanted[:-1]) for (prompt, _), wanted in zip(questions, targets, strict=True))
    return [(row[-base.context :], wanted) for row, wanted in zip(rows, targets, strict=True)]


def _score_batch(base: Base, fed: Sequence[_Row], readings: Sequence[Sequence[_Reading]]) -> dict[Question, Scored]:
    ids, _ = pad_rows([row for row, _ in fed], find_pad(base.tokenizer), "right", base.device)
    rows: list[int] = []
    places: list[int] = []
    wanted: list[int] = []
    for index, ((row, count), own) in enumerate(zip(fed, readings, strict=True)):
        for _, target in own:
            rows += [index] * count
            places += range(len(row) - count, len(row))
            wanted += target or (0,)
    # Causal attention hides padding on the right by itself. An explicit mask of ones says so: it keeps attention on its fast path and
    # transformers from warning about pad tokens.
    body = base.model.get_submodule(base.layout.body)
    with predict_at(torch.tensor(rows, device=base.device), torch.tensor(places, device=base.device)):
        hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state  # [n, longest, d]
    logprobs, chosen = _read_head(base, hidden[rows, places], torch.tensor(wanted, device=base.device))
    scored: dict[Question, Scored] = {}
    start = 0
    for question, target in (reading for own in readings for reading in own):
        span = slice(start, start + max(len(target), 1))
        scored[question] = Scored(target, tuple(logprobs[span]) if target else (), tuple(chosen[span]))
        start = span.stop
    return scored


def _read_head(base: Base, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[list[float], list[int]]:
    """Log-probability of `wanted` [m] and the argmax at each hidden state [m, d]. Softmax in float32 whatever the model's dtype."""
    head = base.model.get_submodule(base.layout.head)
    logprobs: list[float] = []
    chosen: list[int] = []
    for states, tokens in zip(torch.split(hidden, _HEAD_ROWS), torch.split(wanted, _HEAD_ROWS), strict=True):
        logits = head(states).float()  # [rows, vocabulary]
        finite = torch.isfinite(logits).all(-1)
        values = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs += values.masked_fill(~finite, -torch.inf).tolist()
        chosen += logits.argmax(-1).masked_fill(~finite, -1).tolist()
    return logprobs, chosen
