"""Which token rows one edit is optimised over, and where in them its subject ends and its target is predicted (algorithms.md §1.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from errata.edits import SLOT, Edit
from errata.errors import TokenizationError
from errata.modeling.tokens import encode_target, locate_subject
from errata.profiles import Site

KL_PROMPT = "{} is a"
"""MEMIT's essence prompt. Its divergence is read at the subject's last token, so the words behind the subject are never run."""


@dataclass(frozen=True)
class TargetRow:
    """One context of one edit: prompt and all but the last token of the target."""

    ids: list[int]
    site: int
    """Index of the token where δ is added."""
    predicts: list[int]
    """Indices whose next token is a target token."""


@dataclass(frozen=True)
class EditRows:
    """All rows of one edit."""

    target: list[int]
    contexts: list[TargetRow]
    """In the order of the profile's contexts; the bare prompt first."""
    essence: list[int]
    """`KL_PROMPT` up to and including the site."""


def build_rows(
    tokenizer: PreTrainedTokenizerBase, edit: Edit, contexts: Sequence[str], longest: int, place: Site = "subject_last"
) -> EditRows:
    """Rows of one edit.

    Args:
        contexts: prefix templates that end in `{}`.
        longest: the model's context in tokens.
        place: which token is the site (`PrepareOptions.site`).

    Raises:
        TokenizationError: the subject or target cannot be placed, or a row is longer than the context.
    """
    target = encode_target(tokenizer, edit.target_new)
    rows = []
    for context in contexts:
        text = context.replace(SLOT, edit.rewrite_prompt)
        start = len(context) - len(SLOT) + edit.prompt.index(SLOT)
        ids, site = locate_subject(tokenizer, text, start, start + len(edit.subject))
        site = site if place == "subject_last" else len(ids) - 1
        if len(ids) + len(target) > longest:
            raise TokenizationError(
                f"expected prompt, context and target within {longest} tokens, found {len(ids)} + {len(target)} in {text[:60]!r}…"
            )
        rows.append(TargetRow(ids + target[:-1], site, list(range(len(ids) - 1, len(ids) - 1 + len(target)))))
    text = KL_PROMPT.replace(SLOT, edit.subject)
    ids, site = locate_subject(tokenizer, text, 0, len(edit.subject))
    return EditRows(target, rows, ids[: site + 1] if place == "subject_last" else ids)


def build_all_rows(
    tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], contexts: Sequence[str], longest: int, place: Site = "subject_last"
) -> tuple[dict[str, EditRows], dict[str, str]]:
    """Edit id → its rows, or why it has none. Arguments as `build_rows`."""
    rows: dict[str, EditRows] = {}
    refused: dict[str, str] = {}
    for edit in edits:
        try:
            rows[edit.edit_id] = build_rows(tokenizer, edit, contexts, longest, place)
        except TokenizationError as error:
            refused[edit.edit_id] = str(error)
    return rows, refused
