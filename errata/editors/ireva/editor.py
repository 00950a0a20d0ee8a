"""iReVa as an editor: each target token becomes a neuron beside the MLP of one late layer (Retrievable and interpretable model editing,
ACL Findings 2025; timberflow/iReVa at 89c680e; algorithms.md §3).

The published code adds neurons one edit at a time and sums over all earlier ones while it trains. Here keys are read from the base, many
edits at once, and a neuron is trained against the base alone, so that pairs depend on nothing that was there before.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from errata.editors.artifacts import Fetch
from errata.editors.base import Pairs, Preparation, Prepared, Progress
from errata.editors.ireva.irrelevant import find_common, find_own
from errata.editors.ireva.retrofit import Untrained, retrofit_neurons
from errata.editors.ireva.state import NeuronState, spell_blocks
from errata.editors.neurons import NeuronPatch, find_bias, order_written, standardise
from errata.editors.rows import EditRows, build_rows
from errata.edits import Edit, digest_of
from errata.errors import BaseMismatchError, TokenizationError
from errata.modeling.beside import predict_at, respond_beside
from errata.modeling.layout import ModelLayout
from errata.modeling.loading import Base
from errata.modeling.offload import read_parameter
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_target, find_pad, pad_rows
from errata.modeling.trace import capture_outputs
from errata.profiles import NeuronProfile

CHUNK_TOKENS = 4_096
"""Padded tokens that are read side by side."""


class IReVa:
    """One neuron per target token: key = standardised input of the MLP at the last token before it, value = the token's row of the
    unembedding."""

    name = "ireva"
    version = "1"

    def __init__(self, profile: NeuronProfile, layout: ModelLayout, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._profile, self._layout, self._chunk_tokens = profile, layout, chunk_tokens
        # Out-of-scope states that all edits have in common, sampled when first wanted.
        self._common: torch.Tensor | None = None

    @property
    def order_free(self) -> bool:
        """Neurons are read from the base; which of equal ones came last is all that order decides."""
        return True

    @property
    def options(self) -> Mapping[str, Any]:
        return self._profile.solve.model_dump(mode="json")

    def find_groups(self, base: Base, edits: Sequence[Edit]) -> list[tuple[str, ...]]:
        """None: neurons of one subject do not get in each other's way."""
        self._require_base(base)
        return []

    def prepare(
        self,
        base: Base,
        edits: Sequence[Edit],
        on_progress: Progress | None = None,
        groups: Sequence[Sequence[str]] = (),
        state: NeuronState | None = None,
    ) -> Prepared:
        """Neurons of edits, read from the base, in chunks that fit in memory.

        Args:
            groups: none, since `find_groups` finds none.
            state: not looked at.

        Raises:
            BaseMismatchError: the profile is for another base, or the base carries an artifact now.
        """
        self._require_base(base)
        rows, refused = self._build_rows(base, edits)
        by_id = {edit.edit_id: edit for edit in edits}
        parts: list[Pairs] = []
        notes: dict[str, Preparation] = {}
        done = 0
        for chunk in _chunk(rows, self._chunk_tokens):
            read = self._read_chunk(base, [by_id[edit_id] for edit_id in chunk], [rows[edit_id] for edit_id in chunk])
            finite = []
            for index, edit_id in enumerate(chunk):
                if math.isfinite(read.notes[index].loss):
                    finite.append(index)
                    notes[edit_id] = read.notes[index]
                else:
                    refused[edit_id] = "its neurons have non-finite values"
            owners = tuple((edit_id,) for edit_id in chunk)
            scopes = tuple(digest_of(by_id[edit_id].subject_key.encode())[:16] for edit_id in chunk)
            digest, sizes = self._profile.prepare.digest, tuple(len(rows[edit_id].target) for edit_id in chunk)
            keys = {self._profile.prepare.layer: read.keys}
            parts.append(Pairs(base.digest, digest, owners, read.values, keys, sizes=sizes, scopes=scopes).take(finite))
            done += len(chunk)
            if on_progress:
                on_progress(done, len(rows))
        return Prepared(Pairs.concatenate(parts) if notes else None, notes, refused)

    def empty_state(self) -> NeuronState:
        return NeuronState(self._profile.base, self._profile.prepare.digest)

    def load_state(self, source: bytes | Path, fetch: Fetch) -> NeuronState:
        """
        Raises:
            FormatError: not a state.
            BaseMismatchError: a state of another base or other prepare options.
        """
        state = NeuronState.load(source, fetch)
        self._require_own(state)
        return state

    def carry_state(self, state: NeuronState) -> NeuronState | None:
        """See `Editor.carry_state`: every gate takes the same neurons."""
        self._require_own(state)
        return state

    def merge(self, state: NeuronState, add: Pairs | None, remove: Pairs | None) -> NeuronState:
        """Removal first, so that what replaces an edit may take the place of its tombstone."""
        if remove is not None and len(remove):
            state = state.remove(remove)
        if add is not None and len(add):
            width = next(iter(add.keys.values())).shape[1]
            state = state.add(add, find_bias(self._profile.solve.theta, width))
        return state

    def solve(self, state: NeuronState) -> NeuronPatch | None:
        """See `Editor.solve`."""
        self._require_own(state)
        if state.count == 0:
            return None
        gate = self._profile.solve
        return NeuronPatch(
            base=state.base,
            layer=self._profile.prepare.layer,
            theta=gate.theta,
            gain=gate.gain,
            silent=gate.gate == "silent",
            pooled=gate.pooling == "max",
            blocks=spell_blocks(state),
            dead=state.dead,
            parts=state.parts,
        )

    def solve_exact(self, state: NeuronState) -> Mapping[str, torch.Tensor]:
        """See `Editor.solve_exact`: keys and values of the live neurons. Tombstones write nothing."""
        self._require_own(state)
        written = order_written(self._profile.prepare.layer, spell_blocks(state), state.dead)
        return {name: tensor.double() for name, tensor in written.items()}

    def measure_fits(self, state: NeuronState, pairs: Pairs) -> torch.Tensor:
        """The share of its gain that each pair reaches where the input is its key: mean over its neurons of what its own neuron adds, 0
        where another one, or a tombstone, is nearer: [n] float64."""
        patch = self.solve(state)
        if patch is None:
            return torch.zeros(len(pairs), dtype=torch.float64)
        keys = pairs.keys[patch.layer]
        firings = patch.place_on(keys.device).explain(keys)
        starts, fits = pairs.starts, []
        for row, owners in enumerate(pairs.owners):
            own = firings[starts[row] : starts[row + 1]]
            reached = [firing.added / patch.gain if firing.place.edits == owners else 0.0 for firing in own]
            fits.append(sum(reached) / len(reached))
        return torch.tensor(fits, dtype=torch.float64)

    def find_uncovered(self, state: NeuronState) -> dict[str, str]:
        """See `Editor.find_uncovered`: tombstones on whose key a live neuron fires (algorithms.md, resolution L)."""
        self._require_own(state)
        return state.find_uncovered(self._profile.solve.theta)

    def measure_conditions(self, state: NeuronState) -> dict[str, float]:
        """See `Editor.measure_conditions`: nothing is solved for."""
        self._require_own(state)
        return {}

    @torch.no_grad()
    def _read_chunk(self, base: Base, edits: Sequence[Edit], rows: Sequence[EditRows]) -> "_Read":
        """Keys and values of some edits, and what the model says with each neuron at its full gain, in one pass: the key of a later token
        does not depend on what was added before it, since that is added in the layer where the key is read."""
        options, gate = self._profile.prepare, self._profile.solve
        contexts = [row.contexts[0] for row in rows]
        places = torch.tensor([place for context in contexts for place in context.predicts], device=base.device)
        lines = torch.tensor([index for index, context in enumerate(contexts) for _ in context.predicts], device=base.device)
        targets = torch.tensor([token for row in rows for token in row.target], device=base.device)
        values = read_parameter(base.model, f"{base.layout.head}.weight")[targets.cpu()].float().to(base.device)
        found: dict[str, torch.Tensor] = {}

        def respond(x: torch.Tensor) -> torch.Tensor:
            # `predict_at` asks row by row, from left to right, which is the order of `lines` and `places`.
            found["x"] = x
            return (gate.gain * values).to(x.dtype)

        ids, _ = pad_rows([context.ids for context in contexts], find_pad(base.tokenizer), "right", base.device)
        block = {"out": base.layout.block(base.model, options.layer)}
        with respond_beside(base, options.layer, respond), predict_at(lines, places), capture_outputs(block) as outputs:
            body = base.model.get_submodule(base.layout.body)
            hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[lines, places]
        keys = standardise(found["x"])
        before = outputs["out"].clone()
        before[lines, places] -= (gate.gain * values).to(before.dtype)
        if options.retrofit is None:
            losses = functional.cross_entropy(base.model.get_submodule(base.layout.head)(hidden).float(), targets, reduction="none").cpu()
        else:
            own = find_own(base, options.layer, edits, rows)
            strangers = [torch.cat([self._find_common(base), own[line]]) for line in lines.tolist()]
            untrained = Untrained(keys, values, targets, lines, places, before)
            keys, values, losses = retrofit_neurons(base, options.layer, options.retrofit, untrained, strangers)
        shifts = (gate.gain * values.norm(dim=-1) / before[lines, places].float().norm(dim=-1).clamp(min=1e-12)).cpu()
        steps = options.retrofit.steps if options.retrofit else 0
        notes, first = [], 0
        for row in rows:
            last = first + len(row.target)
            loss, shift = float(losses[first:last].mean()), float(shifts[first:last].max())
            whole = bool(torch.isfinite(keys[first:last]).all() and torch.isfinite(values[first:last]).all())
            notes.append(Preparation(loss if whole else math.nan, loss, steps, shift))
            first = last
        return _Read(keys.cpu(), values.cpu(), notes)

    def _find_common(self, base: Base) -> torch.Tensor:
        if self._common is None:
            self._common = find_common(base, self._profile.prepare.layer)
        return self._common

    def _build_rows(self, base: Base, edits: Sequence[Edit]) -> tuple[dict[str, EditRows], dict[str, str]]:
        """Edit id → its token row, or why it has none."""
        most = self._profile.prepare.max_target_tokens
        rows: dict[str, EditRows] = {}
        refused: dict[str, str] = {}
        for edit in edits:
            try:
                if (count := len(encode_target(base.tokenizer, edit.target_new))) > most:
                    refused[edit.edit_id] = (
                        f"expected a target of at most {most} tokens, found {count}: each takes a neuron, and the answer breaks off at the "
                        "first that does not fire (`max_target_tokens` of the profile)"
                    )
                    continue
                rows[edit.edit_id] = build_rows(base.tokenizer, edit, ("{}",), base.span)
            except TokenizationError as error:
                refused[edit.edit_id] = str(error)
        return rows, refused

    def _require_base(self, base: Base) -> None:
        if base.digest != self._profile.base:
            raise BaseMismatchError(f"profile is for the base {self._profile.base[:12]}, this model is {base.digest[:12]}")
        require_untouched(base)

    def _require_own(self, state: NeuronState) -> None:
        expected = {"base": self._profile.base, "prepare options": self._profile.prepare.digest}
        for name, found in (("base", state.base), ("prepare options", state.prepare)):
            if found != expected[name]:
                raise BaseMismatchError(f"state: expected {name} {expected[name][:12]}, found {found[:12]}")


@dataclass(frozen=True)
class _Read:
    keys: torch.Tensor
    """[neurons, d] float32, on the CPU."""
    values: torch.Tensor
    notes: list[Preparation]
    """Per edit."""


def _chunk(rows: Mapping[str, EditRows], tokens: int) -> Iterator[list[str]]:
    """Edit ids in their order, cut so that a chunk's padded tokens stay below `tokens`."""
    chunk: list[str] = []
    longest = 0
    for edit_id, row in rows.items():
        wide = max(longest, len(row.contexts[0].ids))
        if chunk and wide * (len(chunk) + 1) > tokens:
            yield chunk
            chunk, wide = [], len(row.contexts[0].ids)
        chunk.append(edit_id)
        longest = wide
    if chunk:
        yield chunk
