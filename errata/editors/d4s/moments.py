"""Second moments C = E[k kᵀ] of the keys that must be preserved, with the recipe that made them (ROME §3; algorithms.md §1.2)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch

from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.editors.base import Progress
from errata.editors.stored import Lazy, TensorFile
from errata.edits import canonical_json, digest_of
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_prompt, find_pad, pad_rows
from errata.modeling.trace import trace_inputs

_FORMAT = 1
BATCH_TOKENS = 8_192
"""Padded tokens of one pass."""


@dataclass(frozen=True)
class Moments:
    """C per layer. A mean, so that λ counts preserved keys."""

    base: str
    corpus: str
    """Digest of the texts, in order."""
    seed: int
    tokens: int
    """Number of keys in the mean."""
    c: Mapping[int, torch.Tensor]
    """Layer → [d_in, d_in] float32, uncentred."""

    def to_bytes(self) -> bytes:
        metadata = {"base": self.base, "corpus": self.corpus, "seed": self.seed, "tokens": self.tokens}
        return pack_tensors("moments", _FORMAT, {f"c.{layer}": c for layer, c in self.c.items()}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not moments of this format."""
        tensors, metadata = unpack_tensors(data, "moments", _FORMAT)
        c = {int(name.removeprefix("c.")): tensor for name, tensor in tensors.items()}
        return cls(metadata["base"], metadata["corpus"], metadata["seed"], metadata["tokens"], c)

    @classmethod
    def load(cls, source: bytes | Path) -> Self:
        """From bytes, or from a file, where C of each layer stays until it is asked for. Raises FormatError: not moments of this format."""
        if isinstance(source, bytes):
            return cls.from_bytes(source)
        file = TensorFile(source, "moments", _FORMAT)
        c = Lazy({int(name.removeprefix("c.")): shape for name, shape in file.shapes.items()}, lambda layer: file[f"c.{layer}"])
        return cls(file.metadata["base"], file.metadata["corpus"], file.metadata["seed"], file.metadata["tokens"], c)


@torch.no_grad()
def collect_moments(
    base: Base,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> Moments:
    """One pass over a corpus, all layers at once, stopping after the highest layer.

    Args:
        texts: the corpus; read in an order shuffled by `seed`.
        max_tokens: stop once this many keys are counted.
        on_progress: called with (tokens so far, tokens wanted); the second is an estimate without `max_tokens`.

    Raises:
        BaseMismatchError: the base carries an artifact now.
        EditorError: the corpus has no tokens.
    """
    require_untouched(base)
    order = list(texts)
    random.Random(seed).shuffle(order)
    modules = {layer: base.layout.projection_of(base.model, layer) for layer in sorted(layers)}
    sums: dict[int, torch.Tensor] = {}
    counted, pad = 0, find_pad(base.tokenizer)
    rows = [ids for text in order if (ids := encode_prompt(base.tokenizer, text)[: base.context])]
    wanted = min(max_tokens or sum(map(len, rows)), sum(map(len, rows)))
    for chunk in _chunk(rows):
        if counted >= wanted:
            break
        batch, mask = pad_rows(chunk, pad, "right", base.device)
        real = mask.bool()
        with trace_inputs(modules, partial(_take_real, real), stop=True) as found:
            base.model.get_submodule(base.layout.body)(input_ids=batch, attention_mask=mask, use_cache=False)
        for layer, keys in found.items():
            gram = keys.T @ keys
            sums[layer] = sums[layer] + gram if layer in sums else gram
        counted += int(real.sum())
        if on_progress:
            on_progress(min(counted, wanted), wanted)
    if not counted:
        raise EditorError("second moments: expected a corpus with some text, found no tokens")
    c = {layer: (total / counted).float().cpu().contiguous() for layer, total in sums.items()}
    return Moments(base.digest, digest_of(canonical_json(list(texts))), seed, counted, c)


def _take_real(real: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return inputs[real].double()


def _chunk(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """Rows in their order, cut into batches of at most `BATCH_TOKENS` padded tokens."""
    chunks: list[list[list[int]]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if not chunks or longest * (len(chunks[-1]) + 1) > BATCH_TOKENS:
            chunks.append([])
            longest = len(row)
        chunks[-1].append(row)
    return chunks
