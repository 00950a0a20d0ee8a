"""Causal tracing: at which token and layer the model holds what it is asked (Meng et al. 2022, ROME §2.1).

The subject's embeddings are corrupted by noise until the answer is lost; then one hidden state at a time is put back as it was. Where
that brings the answer back, the fact passes; where it is written has to lie at or before such a place.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from errata.calibration.records import Record
from errata.edits import SLOT, Edit
from errata.errors import TokenizationError
from errata.evaluation.scoring import split_by_tokens
from errata.modeling.loading import Base
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_target, find_pad, locate_span, pad_rows
from errata.modeling.trace import change_output
from errata.profiles import Site

NOISE = 3.0
"""Noise in standard deviations of the subjects' embeddings (ROME's ν)."""


class Trace(Record):
    """Mean probability of the true answer's first token over facts and draws of noise."""

    facts: int
    draws: int
    clean: float
    corrupted: float
    restored: dict[Site, tuple[float, ...]]
    """Where a state is put back → per layer, counted at the output of its block."""

    def measure_effects(self, site: Site) -> tuple[float, ...]:
        """Per layer, the share of what corruption took that comes back: 0 nothing, 1 all. Zero where corruption took nothing."""
        lost = self.clean - self.corrupted
        return tuple((value - self.corrupted) / lost if lost > 0 else 0.0 for value in self.restored[site])


class _Row:
    """One fact as token ids, with the places that matter."""

    def __init__(self, base: Base, edit: Edit) -> None:
        start = edit.prompt.index(SLOT)
        self.ids, self.first, self.last = locate_span(base.tokenizer, edit.rewrite_prompt, start, start + len(edit.subject))
        assert edit.target_true is not None, "a traced fact has an answer"
        self.answer = encode_target(base.tokenizer, edit.target_true)[0]


@torch.no_grad()
def trace_facts(
    base: Base,
    facts: Sequence[Edit],
    *,
    draws: int = 3,
    seed: int = 0,
    batch_tokens: int = 2_048,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Trace facts that the model knows.

    Args:
        facts: each with a target_true.
        draws: of noise per fact.
        batch_tokens: padded tokens per forward pass.

    Raises:
        BaseMismatchError: the base carries an artifact now.
        TokenizationError: no fact's subject can be placed.
    """
    require_untouched(base)
    rows = []
    for edit in facts:
        try:
            rows.append(_Row(base, edit))
        except TokenizationError:
            continue  # a trace is a mean over many
    if not rows:
        raise TokenizationError(f"expected a fact whose subject the tokenizer can place, found none among {len(facts)}")
    rows.sort(key=lambda row: len(row.ids))
    sigma = NOISE * _spread_of(base, rows)
    depth = base.layout.count_layers(base.model)
    clean, corrupted = 0.0, 0.0
    restored: dict[Site, list[float]] = {"subject_last": [0.0] * depth, "prompt_last": [0.0] * depth}
    generator = torch.Generator().manual_seed(seed)
    done, total = 0, len(rows) * draws
    for chosen in split_by_tokens([len(row.ids) * draws for row in rows], batch_tokens):
        part = _Part(base, [rows[place] for place in chosen], draws, sigma, generator)
        clean += part.clean.sum().item()
        corrupted += part.run(None).sum().item()
        for site, values in restored.items():
            for layer in range(depth):
                values[layer] += part.run((layer, site)).sum().item()
        done += len(chosen) * draws
        if on_progress:
            on_progress(done, total)
    means: dict[Site, tuple[float, ...]] = {site: tuple(value / total for value in values) for site, values in restored.items()}
    return Trace(facts=len(rows), draws=draws, clean=clean / total, corrupted=corrupted / total, restored=means)


class _Part:
    """Facts of one forward pass, each `draws` times with other noise; what the clean model has at every place is kept."""

    def __init__(self, base: Base, rows: Sequence[_Row], draws: int, sigma: float, generator: torch.Generator) -> None:
        self._base = base
        every = [row for row in rows for _ in range(draws)]
        device = base.device
        self._ids, _ = pad_rows([row.ids for row in every], find_pad(base.tokenizer), "right", device)
        self._every = torch.arange(len(every), device=device)
        self._answers = torch.tensor([row.answer for row in every], device=device)
        self._places: dict[Site, torch.Tensor] = {
            "subject_last": torch.tensor([row.last for row in every], device=device),
            "prompt_last": torch.tensor([len(row.ids) - 1 for row in every], device=device),
        }
        columns = torch.arange(self._ids.shape[1], device=device)
        first = torch.tensor([row.first for row in every], device=device)[:, None]
        noisy = (columns >= first) & (columns <= self._places["subject_last"][:, None])
        width = base.model.get_input_embeddings()(self._ids[:1, :1]).shape[-1]
        noise = torch.randn(*noisy.shape, width, generator=generator) * sigma
        self._noise = noise.to(device) * noisy[..., None]
        self._states: dict[tuple[int, Site], torch.Tensor] = {}
        layers = range(base.layout.count_layers(base.model))
        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(change_output(base.layout.block(base.model, layer), self._keeper(layer)))
            self.clean = self._read_answers()
            """[n] probability of each answer."""

    def run(self, restore: tuple[int, Site] | None) -> torch.Tensor:
        """[n] probability of each answer with the subject corrupted, and one state put back."""
        base = self._base
        with ExitStack() as hooks:
            hooks.enter_context(change_output(base.model.get_input_embeddings(), lambda found: found + self._noise.to(found.dtype)))
            if restore is not None:
                hooks.enter_context(change_output(base.layout.block(base.model, restore[0]), self._restorer(restore)))
            return self._read_answers()

    def _keeper(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def keep(found: torch.Tensor) -> torch.Tensor:
            for site, places in self._places.items():
                self._states[layer, site] = found[self._every, places]
            return found

        return keep

    def _restorer(self, place: tuple[int, Site]) -> Callable[[torch.Tensor], torch.Tensor]:
        def restore(found: torch.Tensor) -> torch.Tensor:
            changed = found.clone()
            changed[self._every, self._places[place[1]]] = self._states[place].to(found.device)
            return changed

        return restore

    def _read_answers(self) -> torch.Tensor:
        base = self._base
        body, head = (base.model.get_submodule(path) for path in (base.layout.body, base.layout.head))
        hidden = body(input_ids=self._ids, attention_mask=torch.ones_like(self._ids), use_cache=False).last_hidden_state
        logits: torch.Tensor = head(hidden[self._every, self._places["prompt_last"]]).float()
        return logits.softmax(dim=-1).gather(1, self._answers[:, None])[:, 0].double().cpu()


def _spread_of(base: Base, rows: Sequence[_Row]) -> float:
    """Standard deviation of the embeddings of the subjects' tokens."""
    ids = sorted({token for row in rows for token in row.ids[row.first : row.last + 1]})
    embeddings: torch.Tensor = base.model.get_input_embeddings()(torch.tensor(ids, device=base.device))
    return embeddings.float().std().item()
