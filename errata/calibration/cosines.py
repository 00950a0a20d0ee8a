"""How near a late layer's keys are to what shall fire them and to what shall not (iReVa §4.1; issue 6, point 2).

A neuron fires where the cosine with its key exceeds θ. So θ belongs between two distributions: paraphrases with the key of their own edit,
and everything else with whichever key is nearest to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from errata.calibration.records import Record
from errata.editors.base import Progress
from errata.editors.neurons import standardise
from errata.edits import SLOT, Edit, Probe
from errata.evaluation.scoring import split_by_tokens
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompts, find_pad, pad_rows
from errata.modeling.trace import trace_inputs

OWN = "paraphrases"
_GENERATED = 3
"""Paraphrases that an edit without any is given."""
_SAME_SUBJECT = 3
"""Other facts of its subject that an edit is asked for at most."""
_QUIET, _CAUGHT = 0.99, 0.05
"""Quantiles between which θ is sought: of what shall not fire, the nearest of its kinds, and of what shall."""


class Cosines(Record):
    """What was read at one layer."""

    layer: int
    own: tuple[float, ...]
    """Per paraphrase, with the key of its own edit."""
    foreign: dict[str, tuple[float, ...]]
    """Kind of what no edit is about → per prompt, with the nearest key."""

    @property
    def separation(self) -> float:
        """The best that any θ can do: share of paraphrases above it less the share of all else, each kind counting alike."""
        at = np.unique(np.concatenate([self.own, *self.foreign.values()]))
        wrong = np.mean([_count_above(values, at) for values in self.foreign.values()], axis=0)
        return float(np.max(_count_above(self.own, at) - wrong))

    @property
    def range(self) -> tuple[float, float]:
        """The range in which θ is sought, ascending: from what nearly all else stays below, to what nearly all paraphrases exceed. Where
        the distributions overlap it is the other way round, and θ a matter of what is worth more."""
        low, high = sorted((self._quiet, self._caught))
        return low, high

    @property
    def overlap(self) -> bool:
        return self._quiet >= self._caught

    @property
    def _quiet(self) -> float:
        return max(float(np.quantile(values, _QUIET)) for values in self.foreign.values())

    @property
    def _caught(self) -> float:
        return float(np.quantile(self.own, _CAUGHT))

    def measure_fired(self, theta: float) -> dict[str, float]:
        """Kind → the share of its prompts at which a neuron would fire."""
        kinds = {OWN: self.own, **self.foreign}
        return {kind: float(_count_above(values, np.array([theta]))[0]) for kind, values in kinds.items()}


class Survey(Record):
    """What was read at the later half of the blocks."""

    completed: int
    """Edits that had no paraphrases: generated contexts before their prompt stand in for them."""
    layers: tuple[Cosines, ...]
    """Ascending."""

    def find(self, layer: int) -> Cosines:
        return next(cosines for cosines in self.layers if cosines.layer == layer)


def complete_edits(edits: Sequence[Edit], others: Sequence[Edit], contexts: Sequence[str]) -> list[Edit]:
    """The edits with something to measure θ on: those without paraphrases get their prompt behind generated contexts, those without
    neighbours the prompt of another edit.

    Args:
        others: edits that are not written beside these.
        contexts: prefix templates that end in `{}`.
    """
    made = []
    for number, edit in enumerate(edits):
        given: dict[str, object] = {}
        if not edit.paraphrase_prompts:
            given["paraphrase_prompts"] = tuple(context.replace(SLOT, edit.rewrite_prompt) for context in contexts[:_GENERATED])
        if not edit.neighborhood_prompts and others:
            given["neighborhood_prompts"] = (Probe(prompt=others[number % len(others)].rewrite_prompt),)
        made.append(edit.model_copy(update=given))
    return made


def list_foreign(edits: Sequence[Edit], others: Sequence[Edit]) -> dict[str, list[str]]:
    """Kind → prompts that none of `edits` is about. Other facts of a subject are asked for with the templates of other relations, which
    takes edits that name theirs.

    Args:
        others: edits that are not written beside these.
    """
    templates: dict[str, str] = {}
    for edit in edits:
        if edit.relation_id:
            templates.setdefault(edit.relation_id, edit.prompt)
    same = [
        template.replace(SLOT, edit.subject)
        for edit in edits
        if edit.relation_id
        for template in [text for name, text in templates.items() if name != edit.relation_id][:_SAME_SUBJECT]
    ]
    own = {prompt for edit in edits for prompt in (edit.rewrite_prompt, *edit.paraphrase_prompts)}
    kinds = {
        "neighbours": [probe.prompt for edit in edits for probe in edit.neighborhood_prompts],
        "same subject": same,
        "other prompts": [edit.rewrite_prompt for edit in others],
    }
    found = {kind: [prompt for prompt in dict.fromkeys(prompts) if prompt not in own] for kind, prompts in kinds.items()}
    return {kind: prompts for kind, prompts in found.items() if prompts}


@torch.inference_mode()
def read_cosines(
    base: Base,
    layers: Sequence[int],
    edits: Sequence[Edit],
    foreign: Mapping[str, Sequence[str]],
    texts: Sequence[str],
    batch_tokens: int,
    on_progress: Progress | None = None,
) -> tuple[Cosines, ...]:
    """Cosines of the standardised MLP inputs at the last token, all layers in one pass.

    Args:
        layers: ascending.
        foreign: kind → prompts that no edit is about.
        texts: are read at every token, each of which is the last one once when it is decoded.
        on_progress: called with the prompts read and all of them.
    """
    keys = {layer: [torch.empty(0)] * len(edits) for layer in layers}
    asked = [_Asked("edits", ids, number) for number, ids in enumerate(_encode(base, [edit.rewrite_prompt for edit in edits]))]
    owners = [number for number, edit in enumerate(edits) for _ in edit.paraphrase_prompts]
    paraphrases = _encode(base, [prompt for edit in edits for prompt in edit.paraphrase_prompts])
    rest = [_Asked(OWN, ids, owner) for owner, ids in zip(owners, paraphrases, strict=True)]
    rest += [_Asked(kind, ids, None) for kind, prompts in foreign.items() for ids in _encode(base, prompts)]
    rest += [_Asked("text", ids[:end], None) for ids in _encode(base, texts) for end in range(1, len(ids) + 1)]
    total = len(asked) + len(rest)
    for done, (batch, states) in _read(base, layers, asked, batch_tokens):
        for layer in layers:
            for one, state in zip(batch, states[layer], strict=True):
                keys[layer][one.owner or 0] = state
        if on_progress:
            on_progress(done, total)
    found: dict[int, dict[str, list[float]]] = {layer: {} for layer in layers}
    stacked = {layer: torch.stack(own) for layer, own in keys.items()}
    for layer, own in stacked.items():
        if len(edits) > 1:
            between = (own @ own.T / (own.shape[1] - 1)).fill_diagonal_(-1.0)
            found[layer]["other edits"] = between.amax(dim=1).tolist()
    for done, (batch, states) in _read(base, layers, rest, batch_tokens):
        for layer, own in stacked.items():
            for one, row in zip(batch, states[layer] @ own.T / (own.shape[1] - 1), strict=True):
                cosine = row.max() if one.owner is None else row[one.owner]
                found[layer].setdefault(one.kind, []).append(float(cosine))
        if on_progress:
            on_progress(len(asked) + done, total)
    rounded = {layer: {kind: tuple(round(value, 4) for value in values) for kind, values in found[layer].items()} for layer in layers}
    return tuple(Cosines(layer=layer, own=kinds.pop(OWN), foreign=kinds) for layer, kinds in rounded.items())


@dataclass(frozen=True)
class _Asked:
    """A prompt, of which the last token is looked at."""

    kind: str
    ids: list[int]
    owner: int | None
    """The edit it is about."""


def _encode(base: Base, prompts: Sequence[str]) -> list[list[int]]:
    """As scoring does: a prompt longer than the context loses its beginning."""
    return [ids[-base.context :] for ids in encode_prompts(base.tokenizer, prompts)] if prompts else []


def _read(
    base: Base, layers: Sequence[int], asked: Sequence[_Asked], batch_tokens: int
) -> Iterator[tuple[int, tuple[list[_Asked], dict[int, torch.Tensor]]]]:
    """Prompts read so far, the last of them, and layer → their standardised inputs [n, d] float32."""
    ordered = sorted(asked, key=lambda one: len(one.ids))
    body = base.model.get_submodule(base.layout.body)
    modules = {layer: base.layout.mlp_of(base.model, layer) for layer in layers}
    for span in split_by_tokens([len(one.ids) for one in ordered], batch_tokens):
        batch = [ordered[place] for place in span]
        ids, _ = pad_rows([one.ids for one in batch], find_pad(base.tokenizer), "right", base.device)
        rows = torch.arange(len(batch), device=base.device)
        last = torch.tensor([len(one.ids) - 1 for one in batch], device=base.device)
        with trace_inputs(modules, lambda x, at=(rows, last): standardise(x[at]), stop=True) as found:  # type: ignore[misc]
            body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        yield span.stop, (batch, dict(found))


def _count_above(values: Sequence[float], at: np.ndarray) -> np.ndarray:
    """Share of `values` above each of `at`."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return 1 - np.searchsorted(ordered, at, side="right") / max(len(ordered), 1)
