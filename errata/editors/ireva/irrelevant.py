"""Texts that an edit is not about, sampled from the base, and what its neurons would see of them (iReVa §4.2; algorithms.md §3.1).

The published code takes two texts begun by nothing, two begun by the subject, and six other edits. Other edits would make a neuron depend
on its company; common openings stand in for them. Each text has a random generator of its own, so that it depends on its beginning only.
"""

from collections.abc import Collection, Sequence

import torch

from errata.editors.neurons import standardise
from errata.editors.rows import EditRows
from errata.edits import Edit, digest_of
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt, find_ends, find_pad, pad_rows
from errata.modeling.trace import trace_inputs

_OPENINGS = ("The", "It was", "In the", "When", "There is", "She")
_EACH = 2
"""Texts begun by the end-of-text token, and by a subject."""
_TOKENS = 10


def find_common(base: Base, layer: int) -> torch.Tensor:
    """States [s, d] float32 of texts that no edit is about."""
    end = min(find_ends(base.tokenizer, base.model), default=find_pad(base.tokenizer))
    starts = [[end]] * _EACH + [encode_prompt(base.tokenizer, text) for text in _OPENINGS]
    seeds, meant = [f"common {number}" for number in range(len(starts))], [set[tuple[int, ...]]()] * len(starts)
    return torch.cat(_read_states(base, layer, starts, seeds, meant))


def find_own(base: Base, layer: int, edits: Sequence[Edit], rows: Sequence[EditRows]) -> list[torch.Tensor]:
    """Per edit, states [s, d] float32 of texts that begin with its subject. Where such a text happens to be the edit's own prompt, and
    small models say little else of a subject, its neurons are meant: those states are left out.

    Args:
        rows: of the edits.
    """
    starts = [encode_prompt(base.tokenizer, edit.subject) for edit in edits for _ in range(_EACH)]
    seeds = [f"{edit.subject_key} {number}" for edit in edits for number in range(_EACH)]
    meant = [
        {tuple(context.ids[: place + 1]) for context in row.contexts for place in context.predicts} for row in rows for _ in range(_EACH)
    ]
    found = _read_states(base, layer, starts, seeds, meant)
    return [torch.cat(found[first : first + _EACH]) for first in range(0, len(found), _EACH)]


@torch.no_grad()
def _read_states(
    base: Base, layer: int, starts: Sequence[list[int]], seeds: Sequence[str], meant: Sequence[Collection[tuple[int, ...]]]
) -> list[torch.Tensor]:
    """Continue each start by two to ten sampled tokens (T = 1); the standardised inputs of the MLP at its sampled tokens.

    Args:
        meant: per start, texts at whose end nothing is read.
    """
    generators = [torch.Generator().manual_seed(int(digest_of(seed.encode())[:12], 16)) for seed in seeds]
    wanted = [int(torch.randint(2, _TOKENS + 1, (1,), generator=generator)) for generator in generators]
    rows = [list(start[-(base.span - _TOKENS) :]) for start in starts]
    body, head = base.model.get_submodule(base.layout.body), base.model.get_submodule(base.layout.head)
    for step in range(_TOKENS):
        ids, _ = pad_rows(rows, find_pad(base.tokenizer), "right", base.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=base.device)
        hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        chances = head(hidden[torch.arange(len(rows), device=base.device), last]).float().softmax(-1).cpu()
        for row, number, generator, chance in zip(rows, wanted, generators, chances, strict=True):
            if step < number:
                row.append(int(torch.multinomial(chance, 1, generator=generator)))
    ids, _ = pad_rows(rows, find_pad(base.tokenizer), "right", base.device)
    module = {layer: base.layout.mlp_of(base.model, layer)}
    with trace_inputs(module, standardise, stop=True) as found:
        body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    states = []
    for index, (row, count, own) in enumerate(zip(rows, wanted, meant, strict=True)):
        states.append(found[layer][index, [place for place in range(len(row) - count, len(row)) if tuple(row[: place + 1]) not in own]])
    return states
