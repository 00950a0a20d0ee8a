"""What the teacher predicts, computed once on the untouched base and kept on disk, so that every epoch and every restart reads it there."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from errata.distill_options import DistillOptions
from errata.distillation.divergence import Distribution, soften
from errata.distillation.rows import Row, batch_by_length, read_spans
from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.edits import canonical_json, digest_of
from errata.errors import EditorError, FormatError
from errata.modeling.loading import Base
from errata.modeling.patch import require_untouched
from errata.placing import write_whole

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the stage (`teacher`, `student`), the rows or steps done, how many there are in all, and losses by name."""

SHARD_ROWS = 256
"""Rows of one file: what an interruption costs at most."""
_FORMAT = 1
_KIND = "teacher"

logger = logging.getLogger(__name__)


class Teacher:
    """The stored predictions of some rows.

    Log-probabilities are kept in float16: near 0, where the mass is, they are exact to their eleventh bit, and each reading is normalised
    again. `size` is their bytes on disk, `reused` how many rows were there already.
    """

    def __init__(self, shards: Sequence[Path], rows: Sequence[Row], reused: int) -> None:
        self._files: list[Any] = [safe_open(path, framework="pt") for path in shards]
        self._bucketed = "ids" in self._files[0].keys()  # noqa: SIM118  safe_open is no mapping
        self._places: list[tuple[int, int, int]] = []
        for shard, part in enumerate(_split(rows)):
            start = 0
            for row in part:
                self._places.append((shard, start, start + len(row.target)))
                start += len(row.target)
        self.size, self.reused = sum(path.stat().st_size for path in shards), reused

    def read(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Distribution:
        """Predictions for some rows, one after the other: one position per target token."""
        ids = self._gather("ids", indices).to(device).long() if self._bucketed else None
        return Distribution(self._gather("logprobs", indices).to(device).float().log_softmax(dim=-1), ids)

    def _gather(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        places = [self._places[index] for index in indices]
        return torch.cat([self._files[shard].get_slice(name)[start:stop] for shard, start, stop in places])


def ask_teacher(base: Base, rows: Sequence[Row], options: DistillOptions, work: Path, on_progress: Progress | None = None) -> Teacher:
    """The teacher's predictions for rows, read from `work` as far as they are there whole, and computed and stored there otherwise.

    Args:
        work: a folder; what is asked has a folder of its own in it, named by a digest.

    Raises:
        BaseMismatchError: an artifact is attached to the base.
        EditorError: the base predicts something that is not finite.
    """
    require_untouched(base)
    folder = work / f"teacher-{digest_rows(base, rows, options)[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    shards, done, reused = [], 0, 0
    for index, part in enumerate(_split(rows)):
        path, digest = folder / f"{index:05d}.safetensors", digest_rows(base, part, options)
        if _is_whole(path, digest):
            reused += len(part)
        else:
            write_whole(path, _pack(_predict(base, part, options), digest))
        shards.append(path)
        done += len(part)
        if on_progress:
            on_progress("teacher", done, len(rows), {})
    return Teacher(shards, rows, reused)


def digest_rows(base: Base, rows: Sequence[Row], options: DistillOptions) -> str:
    """Names what a teacher is asked for."""
    asked = [[row.taught, row.target] for row in rows]
    return digest_of(canonical_json([_FORMAT, base.digest, options.temperature, options.top_k, asked]))


def _split(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), SHARD_ROWS):
        yield rows[start : start + SHARD_ROWS]


@torch.inference_mode()
def _predict(base: Base, rows: Sequence[Row], options: DistillOptions) -> Distribution:
    found: list[Distribution | None] = [None] * len(rows)
    for batch in batch_by_length([row.taught for row in rows], options.teacher_tokens):
        counts = [len(rows[index].target) for index in batch]
        logits = read_spans(base, [rows[index].taught for index in batch], counts)
        if not torch.isfinite(logits).all():
            raise EditorError(f"teacher: expected finite logits of the base, found others for {rows[batch[0]].lesson.prompt[:60]!r}")
        softened = soften(logits, options.temperature, options.top_k)
        for index, part in zip(batch, _cut(softened, counts), strict=True):
            found[index] = part
    ordered = [part for part in found if part is not None]
    kept = [read.ids for read in ordered if read.ids is not None]
    return Distribution(torch.cat([read.logprobs for read in ordered]), torch.cat(kept) if kept else None)


def _cut(read: Distribution, counts: list[int]) -> list[Distribution]:
    """Row by row, as it is stored."""
    logprobs = torch.split(read.logprobs.half().cpu(), counts)
    if read.ids is None:
        return [Distribution(part) for part in logprobs]
    return [Distribution(*parts) for parts in zip(logprobs, torch.split(read.ids.int().cpu(), counts), strict=True)]


def _pack(read: Distribution, digest: str) -> bytes:
    tensors = {"logprobs": read.logprobs} | ({"ids": read.ids} if read.ids is not None else {})
    return pack_tensors(_KIND, _FORMAT, tensors, {"rows": digest, "content": _digest_tensors(tensors)})


def _is_whole(path: Path, digest: str) -> bool:
    """Whether a shard holds what was asked, unharmed."""
    if not path.exists():
        return False
    try:
        tensors, metadata = unpack_tensors(path.read_bytes(), _KIND, _FORMAT)
    except FormatError:
        metadata = {}
    if metadata.get("rows") == digest and metadata.get("content") == _digest_tensors(tensors):
        return True
    logger.warning("%s: expected a teacher's predictions, found it damaged; they are computed again", path)
    return False


def _digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
