"""Whether a model still writes text, and does not repeat itself: the n-gram entropy of what it says (ROME; algorithms.md, Part 4)."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

from errata.evaluation.generation import decode_rows
from errata.evaluation.scoring import split_by_tokens
from errata.modeling.loading import Base
from errata.modeling.queries import encode_queries
from errata.modeling.tokens import find_ends

_WORD = re.compile(r"\w+|[^\w\s]")
_TOP = 5
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def measure_entropy(text: str) -> float | None:
    """Mean of 2/3 of the entropy of its bigrams and 4/3 of that of its trigrams, in bits. None for a text of fewer than three words.

    kmeng01/rome `n_gram_entropy`, which splits words with nltk; here a word is a run of letters and digits, or one other sign. Published
    values are 100 times these.
    """
    words = _WORD.findall(text)
    if len(words) < max(_WEIGHTS):
        return None
    return sum(weight * _entropy(_list_grams(words, size)) for size, weight in _WEIGHTS.items()) / 2


@torch.inference_mode()
def sample_texts(base: Base, prompts: Sequence[str], *, tokens: int, seed: int, batch_tokens: int) -> list[str]:
    """What the model as it is now says after each prompt: each token one of the five likeliest, as ROME and MEMIT draw them, the prompt
    left out. A text ends where the model ends it, or the context does.

    Args:
        tokens: most of a text.
        seed: equal seeds give equal texts wherever the logits are equal.
    """
    length = max(min(tokens, base.context // 2), 1)
    fed = encode_queries(base, prompts, length)
    order = sorted(range(len(prompts)), key=lambda index: len(fed[index]))
    texts = [""] * len(prompts)
    for batch in split_by_tokens([len(fed[index]) + length for index in order], batch_tokens):
        indices = [order[place] for place in batch]
        drawn = _draw_rows(base, [fed[index] for index in indices], [(seed, index) for index in indices], length)
        for index, ids in zip(indices, drawn, strict=True):
            texts[index] = str(base.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def _draw_rows(base: Base, rows: Sequence[list[int]], seeds: Sequence[tuple[int, int]], length: int) -> list[list[int]]:
    """Sampled tokens of each row. Every row draws from a generator of its own, so that it does not depend on its neighbours."""
    generators = [torch.Generator().manual_seed(1_000_003 * seed + row) for seed, row in seeds]
    ends = find_ends(base.tokenizer, base.model)
    drawn: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)

    def choose(logits: torch.Tensor) -> list[int] | None:
        best = logits.float().cpu().nan_to_num(nan=-torch.inf).topk(min(_TOP, logits.shape[-1]))
        tokens = []
        for row, generator in enumerate(generators):
            chances = best.values[row].softmax(0).nan_to_num(nan=1.0)
            token = int(best.indices[row, torch.multinomial(chances, 1, generator=generator)])
            tokens.append(token)
            ended[row] |= token in ends
            if not ended[row]:
                drawn[row].append(token)
        return None if all(ended) else tokens

    decode_rows(base, rows, length, choose)
    return drawn


def _list_grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _entropy(grams: Sequence[tuple[str, ...]]) -> float:
    counts = Counter(grams)
    return -sum(count / len(grams) * math.log2(count / len(grams)) for count in counts.values())
