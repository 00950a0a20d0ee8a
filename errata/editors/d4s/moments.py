"""Second moments C = E[k kᵀ] of the keys that must be preserved, with the recipe that made them (ROME §3; algorithms.md §1.2).

Sums of k kᵀ over the tokens of a shard (`sum_moments`) are kept per layer, so that they can be stored, and added in a fixed order.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch

from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.editors.base import Progress
from errata.editors.d4s.spectrum import LayerSpectrum, MomentsReport, measure_rank
from errata.editors.stored import Lazy, TensorFile
from errata.edits import canonical_json, digest_of
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_prompts, find_pad, pad_rows
from errata.modeling.trace import visit_inputs

_FORMAT = 1
BATCH_TOKENS = 8_192
"""Padded tokens of one pass."""
_ENCODED = 64
"""Passages that are tokenised at once."""


@dataclass(frozen=True)
class Moments:
    """C per layer. A mean, so that λ counts preserved keys."""

    base: str
    corpus: str
    """Digest of the texts, in order, or of the files."""
    seed: int
    tokens: int
    """Number of keys in the mean."""
    c: Mapping[int, torch.Tensor]
    """Layer → [d_in, d_in] float32, uncentred."""
    report: MomentsReport | None = None
    """What is known of how good C is; None where it was not measured in shards."""

    def to_bytes(self) -> bytes:
        metadata: dict[str, Any] = {"base": self.base, "corpus": self.corpus, "seed": self.seed, "tokens": self.tokens}
        if self.report is not None:  # moments without one keep their bytes
            metadata["report"] = self.report.model_dump(mode="json")
        return pack_tensors("moments", _FORMAT, {f"c.{layer}": c for layer, c in self.c.items()}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not moments of this format."""
        tensors, metadata = unpack_tensors(data, "moments", _FORMAT)
        c = {int(name.removeprefix("c.")): tensor for name, tensor in tensors.items()}
        return cls._read(metadata, c)

    @classmethod
    def load(cls, source: bytes | Path) -> Self:
        """From bytes, or from a file, where C of each layer stays until it is asked for. Raises FormatError: not moments of this format."""
        if isinstance(source, bytes):
            return cls.from_bytes(source)
        file = TensorFile(source, "moments", _FORMAT)
        c = Lazy({int(name.removeprefix("c.")): shape for name, shape in file.shapes.items()}, lambda layer: file[f"c.{layer}"])
        return cls._read(file.metadata, c)

    @classmethod
    def _read(cls, metadata: dict[str, Any], c: Mapping[int, torch.Tensor]) -> Self:
        report = MomentsReport.model_validate(metadata["report"]) if "report" in metadata else None
        return cls(metadata["base"], metadata["corpus"], metadata["seed"], metadata["tokens"], c, report)


@dataclass(frozen=True)
class MomentSum:
    """Σ k kᵀ of one layer over the tokens of one shard."""

    base: str
    layer: int
    tokens: int
    """Number of keys in the sum."""
    total: torch.Tensor
    """[d_in, d_in] float64 on the CPU, symmetric."""

    def to_bytes(self) -> bytes:
        """Its upper triangle, row by row: half the bytes."""
        metadata = {"base": self.base, "layer": self.layer, "tokens": self.tokens, "width": len(self.total)}
        return pack_tensors("moment_sum", _FORMAT, {"upper": self.total[_mask_upper(len(self.total))]}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a sum of this format."""
        tensors, metadata = unpack_tensors(data, "moment_sum", _FORMAT)
        total = torch.zeros(metadata["width"], metadata["width"], dtype=torch.float64)
        total[_mask_upper(len(total))] = tensors["upper"]
        total += total.triu(1).T
        return cls(metadata["base"], metadata["layer"], metadata["tokens"], total)


class PooledSum:
    """Sums of one layer, shard after shard, with the scatter of their means (West 1979, doi:10.1145/359146.359153): a few matrices in
    memory, however many shards there are."""

    def __init__(self) -> None:
        self.tokens, self.shards = 0, 0
        self._total = torch.zeros(0, 0, dtype=torch.float64)
        self._scatter = 0.0

    @classmethod
    def pool(cls, parts: Iterable[MomentSum]) -> Self:
        """The sums in the order given: another order gives other last bits."""
        pooled = cls()
        for part in parts:
            pooled.add(part)
        return pooled

    def add(self, part: MomentSum) -> None:
        if self.tokens:
            apart = torch.linalg.matrix_norm(part.total / part.tokens - self._total / self.tokens)
            self._scatter += float(apart) ** 2 * self.tokens * part.tokens / (self.tokens + part.tokens)
            self._total += part.total
        else:
            self._total = part.total.clone()
        self.tokens += part.tokens
        self.shards += 1

    @property
    def mean(self) -> torch.Tensor:
        """C [d_in, d_in] float64. Raises EditorError: there were no tokens."""
        if not self.tokens:
            raise EditorError("second moments: expected a corpus with some text, found no tokens")
        return self._total / self.tokens

    def describe(self, layer: int) -> LayerSpectrum:
        """Raises EditorError: there were no tokens, or the sums are not finite."""
        c = self.mean
        rank, effective = measure_rank(c)
        noise = math.sqrt(self._scatter / (self.shards - 1)) / float(torch.linalg.matrix_norm(c)) if self.shards > 1 else None
        return LayerSpectrum(layer=layer, width=len(c), rank=rank, effective_rank=effective, noise=noise)


@torch.no_grad()
def sum_moments(
    base: Base,
    layers: Sequence[int],
    rows: Iterable[Sequence[int]],
    *,
    limit: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[MomentSum]:
    """One pass over token rows, all layers at once, stopping after the highest layer; padding is never counted.

    Sums are held in float64 where the layer is, or on the CPU where that device has no float64; keys become float64 one layer at a time.

    Args:
        rows: token ids, none empty, none longer than the base's context (`encode_rows`).
        limit: number of keys to stop at, exactly; the last row is cut, which changes none of the keys before the cut.
        on_tokens: called with the number of keys so far.

    Returns:
        One sum per layer, ascending. Nothing where there are no tokens.

    Raises:
        BaseMismatchError: the base carries an artifact now.
    """
    require_untouched(base)
    modules = {layer: base.layout.projection_of(base.model, layer) for layer in sorted(layers)}
    totals: dict[int, torch.Tensor] = {}
    counted, pad = 0, find_pad(base.tokenizer)
    real = torch.empty(0)

    def add(layer: int, inputs: torch.Tensor) -> None:
        keys = inputs[real.to(inputs.device)]
        keys = keys.cpu().double() if keys.device.type == "mps" else keys.double()
        if layer not in totals:
            totals[layer] = keys.new_zeros(keys.shape[1], keys.shape[1])
        totals[layer].addmm_(keys.T, keys)

    for chunk in _chunk(_cut(rows, limit)):
        batch, mask = pad_rows(chunk, pad, "right", base.device)
        real = mask.bool()
        with visit_inputs(modules, add, stop=True):
            base.model.get_submodule(base.layout.body)(input_ids=batch, attention_mask=mask, use_cache=False)
        counted += sum(map(len, chunk))
        if on_tokens:
            on_tokens(counted)
    for layer in sorted(totals):
        yield MomentSum(base.digest, layer, counted, totals.pop(layer).cpu())


def encode_rows(base: Base, passages: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of passages, cut to the base's context; a passage without tokens has no row."""
    left = iter(passages)
    while texts := list(islice(left, _ENCODED)):
        yield from (ids[: base.context] for ids in encode_prompts(base.tokenizer, texts) if ids)


def collect_moments(
    base: Base,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> Moments:
    """Second moments of texts in memory, in one go.

    Args:
        texts: the corpus; read in an order shuffled by `seed`.
        max_tokens: stop at this number of keys.
        on_progress: called with (tokens so far, tokens wanted).

    Raises:
        BaseMismatchError: the base carries an artifact now.
        EditorError: the corpus has no tokens.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    rows = list(encode_rows(base, order))
    wanted = min(max_tokens or sum(map(len, rows)), sum(map(len, rows)))
    tell = (lambda done: on_progress(done, wanted)) if on_progress else None
    c, counted = {}, 0
    for part in sum_moments(base, layers, rows, limit=wanted, on_tokens=tell):
        c[part.layer], counted = (part.total / part.tokens).float(), part.tokens
    if not counted:
        raise EditorError("second moments: expected a corpus with some text, found no tokens")
    return Moments(base.digest, digest_of(canonical_json(list(texts))), seed, counted, c)


def _mask_upper(width: int) -> torch.Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu()


def _cut(rows: Iterable[Sequence[int]], limit: int | None) -> Iterator[Sequence[int]]:
    """Rows up to `limit` tokens in all."""
    left = limit
    for row in rows:
        if left is None:
            yield row
            continue
        if not left:
            return
        yield row[:left]
        left -= min(left, len(row))


def _chunk(rows: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows in their order, cut into batches of at most `BATCH_TOKENS` padded tokens."""
    chunk: list[Sequence[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if chunk and longest * (len(chunk) + 1) > BATCH_TOKENS:
            yield chunk
            chunk, longest = [], len(row)
        chunk.append(row)
    if chunk:
        yield chunk
