"""Text to token ids: prompts, targets, the subject's last token, padding, ends. The leading-space rule lives here and nowhere else."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import TokenizationError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt, with whatever the tokenizer itself puts in front (BOS) and never anything else."""
    ids: list[int] = tokenizer(text).input_ids
    return ids


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """As `encode_prompt`, for many at once: a fast tokenizer then uses all cores."""
    rows: list[list[int]] = tokenizer(list(texts)).input_ids
    return rows


def encode_target(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Ids of a target as it continues a prompt: one leading space in the text, no special tokens.

    Byte-level BPE wants the space written out (" Paris"); SentencePiece vocabularies add their own mark, and a written space would
    become a second one (EasyEdit #236: "double spaces" on Llama). Which of the two holds is asked of the tokenizer, not of its name.

    Raises:
        TokenizationError: the target has no tokens, or decodes to another text.
    """
    text = target.strip()
    ids: list[int] = tokenizer(_lead(tokenizer) + text, add_special_tokens=False).input_ids
    if not text or not ids:
        raise TokenizationError(f"expected a target of at least one token, found none in {target!r}")
    decoded = str(tokenizer.decode(ids, skip_special_tokens=False)).strip()
    if decoded != text:
        raise TokenizationError(f"the tokenizer cannot write {text[:60]!r}: it reads it back as {decoded[:60]!r}")
    return ids


def can_write(tokenizer: PreTrainedTokenizerBase, target: str) -> bool:
    """Whether `encode_target` has ids for a target."""
    try:
        return bool(encode_target(tokenizer, target))
    except TokenizationError:
        return False


def _lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """ " " where a continuing word must be written with its space, else "". Judged on how "a b" continues "a"."""
    head: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    both: list[int] = tokenizer("a b", add_special_tokens=False).input_ids
    tail = both[len(head) :]
    return "" if tokenizer("b", add_special_tokens=False).input_ids == tail else " "


def locate_subject(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> tuple[list[int], int]:
    """Ids of `text` and the index of the token that holds the subject's last character. Arguments and faults as `locate_span`."""
    ids, _, last = locate_span(tokenizer, text, start, end)
    return ids, last


def locate_span(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> tuple[list[int], int, int]:
    """Ids of `text` and the indices of the tokens that hold the subject's first and last characters.

    Args:
        text: a prompt with the subject written out.
        start, end: the subject's character span in `text`.

    Raises:
        TokenizationError: no fast tokenizer (only those know offsets), or no token covers the subject.
    """
    if not tokenizer.is_fast:
        raise TokenizationError(f"expected a fast tokenizer, which knows character offsets; found {type(tokenizer).__name__}")
    encoded: Any = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = encoded.input_ids
    inside = [index for index, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > start and last > first]
    if not inside or encoded["offset_mapping"][inside[-1]][1] < end:
        raise TokenizationError(f"no token covers the end of the subject {text[start:end]!r} in {text[:80]!r}")
    return ids, inside[0], inside[-1]


def pad_rows(rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one batch.

    Returns:
        ids [n, longest] int64 and mask [n, longest] int64, 1 where a token is real. With `side="right"` a causal model needs no mask.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    return ids.to(device), mask.to(device)


def find_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with: the tokenizer's own, else its end of text, else 0. Padded positions are always masked or ignored."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def find_ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """Every id that ends a text: the tokenizer's and those of the model's generation config (Llama 3 has several)."""
    ends: set[int] = set()
    for source in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        ends.update(source if isinstance(source, list | tuple) else [source] if isinstance(source, int) else [])
    return ends
