"""The facts nearest to a question: which demonstrations a model is shown. This module travels inside every MLflow version.

Up to a size all rows are compared; above it faiss groups them around centres and reads the nearest groups. On a GPU torch compares all
rows at any size. Whatever found the candidates, they are ranked by their exact inner product, and of equal scores the fact that was added
first wins.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from errata.errors import EditorError
from errata.retrieval.encoder import Vectors
from errata.retrieval.index import build_cells, has_faiss, rank_rows, score_rows

CELLS_FROM = 50_000
"""Facts on a CPU from which faiss answers, if it is installed. It is faster from 10,000 on, but comparing all rows is exact: it is kept
for as long as it is little beside an answer to twelve demonstrations (`python -m benchmarks.retrieval`: 17 ms on a busy core)."""
_CELLS_PER_ROOT = 2
"""Centres are so many times the square root of the number of facts. More would be learnt too slowly without a GPU."""
_PROBED = 64
_SPARE = 32
"""Candidates that faiss is asked for beyond those wanted: its vectors are halves, and what was removed is among them no more."""
_AT_ONCE = 2**26
"""Scores that are held at a time, at most: 256 MB."""


class NearestFacts:
    """Vectors of facts by id. Grows by appending; what is removed is overwritten at once, and its room given back once it is half of all.

    Args:
        device: where rows are kept and compared; None takes a GPU where there is one.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._rows = torch.empty(0, 0)
        self._removed = torch.empty(0, dtype=torch.bool)
        self._norm = 0.0
        self._ids: list[str | None] = []
        """By row; None where a fact was removed."""
        self._places: dict[str, int] = {}
        self._cells: Any = None
        self._celled = 0
        """How many rows there were when the centres were learnt."""

    def __len__(self) -> int:
        return len(self._places)

    def add(self, ids: Sequence[str], vectors: Vectors | torch.Tensor) -> None:
        """Appends facts.

        Args:
            vectors: [n, d], rows of length 1; d is that of the first ones added.

        Raises:
            EditorError: another number or width of rows than expected, values that are not finite, or an id that is there or comes twice.
        """
        rows = torch.as_tensor(vectors).detach().to(self._device, torch.float32)
        self._check(rows)
        if len(rows) != len(ids):
            raise EditorError(f"nearest facts: expected a vector for each of {len(ids)} facts, found {len(rows)}")
        if not bool(rows.isfinite().all()):
            raise EditorError("nearest facts: expected finite vectors, found others")
        places = dict(zip(ids, range(len(self._ids), len(self._ids) + len(ids)), strict=True))
        if len(places) < len(ids) or any(id in self._places for id in ids):
            raise EditorError("nearest facts: expected new ids, found one that is there or comes twice")
        if not ids:
            return
        used = len(self._ids)
        if used + len(rows) > len(self._rows):
            room = max(used + len(rows), used + used // 2)
            grown, removed = rows.new_empty(room, rows.shape[1]), torch.zeros(room, dtype=torch.bool, device=rows.device)
            if used:
                grown[:used], removed[:used] = self._rows[:used], self._removed[:used]
            self._rows, self._removed = grown, removed
        self._rows[used : used + len(rows)] = rows
        self._norm = max(self._norm, float(rows.norm(dim=1).max()))
        self._ids.extend(ids)
        self._places |= places
        if self._cells is not None and len(self) <= 4 * self._celled:
            self._cells.add_with_ids(rows.numpy(), np.fromiter(places.values(), dtype=np.int64))
        else:
            self._arrange()

    def remove(self, ids: Iterable[str]) -> None:
        """Forgets facts; an id that is not there is none.

        Their vectors are overwritten before this returns."""
        places = [self._places.pop(id) for id in dict.fromkeys(ids) if id in self._places]
        if not places:
            return
        for place in places:
            self._ids[place] = None
        self._rows[places], self._removed[places] = 0, True
        if self._cells is not None:
            self._cells.remove_ids(np.asarray(places, dtype=np.int64))
        if 2 * len(self) < len(self._ids):
            kept = sorted(self._places.values())
            self._rows, self._removed = self._rows[kept], torch.zeros(len(kept), dtype=torch.bool, device=self._device)
            self._ids = [self._ids[place] for place in kept]
            self._places = {id: place for place, id in enumerate(self._ids) if id is not None}
            self._arrange()

    def search(self, vectors: Vectors | torch.Tensor, k: int) -> tuple[torch.Tensor, list[list[str]]]:
        """The `k` nearest facts of each query (all, if there are fewer), nearest first; of equal scores the one that was added first.
        Above `CELLS_FROM` a far one of them may be missed for another that is about as far.

        Args:
            vectors: [n, d], rows of length 1.
            k: > 0.

        Returns:
            Inner products [n, c] float32 on the CPU and ids, n lists of c; c = min(k, number of facts).

        Raises:
            EditorError: queries of another width than the facts', or k below 1.
        """
        if k < 1:
            raise EditorError(f"nearest facts: expected k of at least 1, found {k}")
        queries = torch.as_tensor(vectors).detach().to(self._device, torch.float32)
        self._check(queries)
        count = min(k, len(self))
        scores, ids = torch.empty(len(queries), count), []
        if not count:
            return scores, [[] for _ in queries]
        step = max(1, _AT_ONCE // len(self._ids))
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            for place, (exact, rows) in enumerate(self._rank(part, count), start):
                scores[place] = exact.cpu()
                ids.append([id for row in rows.tolist() if (id := self._ids[row]) is not None])
        return scores, ids

    def _rank(self, queries: torch.Tensor, count: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Scores and rows of the best `count` of each query."""
        rows = self._rows[: len(self._ids)]
        if self._cells is not None:
            _, found = self._cells.search(queries.numpy(), count + _SPARE)
            for query, candidates in zip(queries, torch.from_numpy(found), strict=True):
                candidates = candidates[candidates >= 0].sort().values
                if len(candidates) < count:  # the groups that were read hold too few
                    yield self._rank_all(rows, rows @ query, query, count)
                    continue
                exact = score_rows(rows[candidates], query)
                order = exact.sort(descending=True, stable=True).indices[:count]
                yield exact[order], candidates[order]
            return
        for query, rough in zip(queries, (rows @ queries.T).T, strict=True):
            yield self._rank_all(rows, rough, query, count)

    def _rank_all(self, rows: torch.Tensor, rough: torch.Tensor, query: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self) < len(self._ids):
            rough = rough.masked_fill(self._removed[: len(rows)], -math.inf)
        return rank_rows(rows, query, count, rough=rough, norm=self._norm)

    def _arrange(self) -> None:
        """Groups the rows, where there are enough of them."""
        self._cells = None
        if self._device.type == "cpu" and len(self) >= CELLS_FROM and has_faiss():
            places = np.fromiter(sorted(self._places.values()), dtype=np.int64)
            rows = self._rows[: len(self._ids)] if len(self) == len(self._ids) else self._rows[places]
            centres = _CELLS_PER_ROOT * math.isqrt(len(rows))
            self._cells = build_cells(rows, centres, _PROBED, ids=places)
            self._celled = len(self)

    def _check(self, rows: torch.Tensor) -> None:
        width = self._rows.shape[1] if len(self._ids) else rows.shape[-1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise EditorError(f"nearest facts: expected vectors of shape [n, {width}], found {list(rows.shape)}")
