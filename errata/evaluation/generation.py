"""Greedy answers with a natural stop, many prompts at once, and the rule by which an answer counts as right.

Teacher forcing leaks the answer's content and length; this is the honest measurement beside it ("The Mirage of Model Editing", ACL 2025).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from errata.evaluation.scoring import Progress, split_by_tokens
from errata.modeling.loading import Base
from errata.modeling.queries import encode_queries
from errata.modeling.tokens import find_ends, find_pad, pad_rows

_SENTENCE_END = re.compile(r"""(\S+?)[.!?]+["'”’)\]]*(?=\s)""")
_ABBREVIATIONS = frozenset(["st", "mr", "mrs", "ms", "dr", "jr", "sr", "mt", "vs", "prof", "gen", "col"])


class Continued(NamedTuple):
    """A prompt and how a model goes on."""

    prompt: list[int]
    """Ids that were fed."""
    answer: str
    """Cut at its natural stop and trimmed."""
    ids: list[int]
    """Those of the answer; at least one, which is the token that ended it where there is no answer."""


@torch.inference_mode()
def continue_prompt(base: Base, prompt: str, *, max_new_tokens: int) -> Continued:
    """The same answer as `generate_answers` gives, with its tokens."""
    (fed,) = encode_queries(base, [prompt], max_new_tokens)
    ((answer, ids),) = _continue_rows(base, [fed], max_new_tokens)
    needed = (count for count in range(1, len(ids)) if len(_decode(base, ids[:count]).strip()) >= len(answer))
    return Continued(fed, answer, ids[: next(needed, len(ids))])


@torch.inference_mode()
def generate_answers(
    base: Base, prompts: Sequence[str], *, max_new_tokens: int, batch_tokens: int, stage: str = "answer", progress: Progress | None = None
) -> list[str]:
    """Greedy continuations of `prompts` under the model as it is now, each cut at its natural stop (`find_stop`) and trimmed.

    Rows of similar length share a batch, padded on the left with masked positions; positions count from each row's first real token,
    so a row's answer does not depend on its neighbours beyond rounding. A prompt that leaves no room in the context loses its beginning.
    """
    encoded = encode_queries(base, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers = [""] * len(prompts)
    done = 0
    for batch in split_by_tokens([len(encoded[index]) + max_new_tokens for index in order], batch_tokens):
        indices = [order[place] for place in batch]
        for index, (answer, _) in zip(indices, _continue_rows(base, [encoded[index] for index in indices], max_new_tokens), strict=True):
            answers[index] = answer
        done += len(indices)
        if progress:
            progress(stage, done, len(prompts))
    return answers


def decode_rows(base: Base, rows: Sequence[list[int]], length: int, choose: Callable[[torch.Tensor], list[int] | None]) -> None:
    """Decode rows side by side with a KV cache: padded on the left with masked positions, positions counted from each row's first token.

    Args:
        length: tokens at most.
        choose: called with logits [rows, vocabulary]; the next token of each row, or None where nobody wants any.
    """
    body, head = base.model.get_submodule(base.layout.body), base.model.get_submodule(base.layout.head)
    tokens, mask = pad_rows(rows, find_pad(base.tokenizer), "left", base.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    for _ in range(length):
        output = body(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen = choose(head(output.last_hidden_state[:, -1]))
        if chosen is None:
            return
        tokens, positions = torch.tensor(chosen, device=base.device)[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def find_stop(text: str) -> int | None:
    """Where an answer ends by itself: before the first newline after some text, or after the first finished sentence. None: it goes on.

    A sentence is finished once white space follows its mark, so "3.5" and "U.S." at the end of what is known so far stay open; initials
    and common abbreviations ("J. R. R. Tolkien", "St. Petersburg") do not finish one.
    """
    start = len(text) - len(text.lstrip())
    newline = text.find("\n", start)
    for match in _SENTENCE_END.finditer(text, start):
        if newline != -1 and match.end() > newline:
            break
        word = match[1].lstrip("\"'“‘([")
        if not (len(word) == 1 and word.isalpha()) and word.casefold() not in _ABBREVIATIONS and "." not in word:
            return match.end()
    return newline if newline != -1 else None


def match_answer(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer begins with one of `accepted`, ending on a word boundary: "Paris, France" answers "Paris", "Parisian" does not.

    Both sides are compared in NFC, casefolded, with white space collapsed and without opening quotes or brackets.
    """
    given = _normalise(answer)
    for wanted in map(_normalise, accepted):
        if wanted and given.startswith(wanted) and not given[len(wanted) : len(wanted) + 1].isalnum():
            return True
    return False


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).lstrip("\"'“‘«([ ")


def _continue_rows(base: Base, rows: Sequence[list[int]], max_new_tokens: int) -> list[tuple[str, list[int]]]:
    """The rows' answers, with all tokens that were chosen until it was known that they had ended. Runs until each row has stopped; a
    stopped row is carried along and ignored."""
    ends = find_ends(base.tokenizer, base.model)
    chosen_ids: list[list[int]] = [[] for _ in rows]
    written: list[list[int]] = [[] for _ in rows]
    answers: list[str | None] = [None] * len(rows)

    def choose(logits: torch.Tensor) -> list[int] | None:
        chosen: list[int] = logits.argmax(-1).tolist()
        for index, token in enumerate(chosen):
            if answers[index] is None:
                chosen_ids[index].append(token)
                if token not in ends:
                    written[index].append(token)
                text = _decode(base, written[index])
                stop = len(text) if token in ends else find_stop(text)
                if stop is not None:
                    answers[index] = text[:stop]
        return None if all(answer is not None for answer in answers) else chosen

    decode_rows(base, rows, max_new_tokens, choose)
    texts = [(_decode(base, ids) if answer is None else answer).strip() for answer, ids in zip(answers, written, strict=True)]
    return list(zip(texts, chosen_ids, strict=True))


def _decode(base: Base, ids: list[int]) -> str:
    text = base.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)  # a list of texts comes back for a list of rows only
    return text
