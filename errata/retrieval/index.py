"""The stored key with the largest inner product: which neuron of an iReVa patch a query would activate, in one step per decoded token.

Three forms of one answer, chosen by size from `benchmarks/neuron_lookup.py`:

    product  one float32 matrix product over all keys
    half     the same over a float16 copy: it moves half the bytes. Every row that its rounding cannot rule out is scored anew,
             so that the answer is that of `product`, which still answers several queries at once: it reads the keys once for all.
             Half as much memory again.
    cells    faiss: keys in float16, grouped around 512 centres, of which the nearest 128 are read. Half as much memory again, seconds to
             build. It finds every key that a query means (cosine .8 and above); where nothing is near, rarely another row that is as far.

Whatever found the candidates, they are told apart by one and the same score: the inner product with the full-precision key, summed in
float64 and rounded to float32. Equal keys have equal scores by it, which no blocked product promises; of equal scores the first row wins.
"""

import importlib.util
import math
from typing import Any, Literal

import torch

from errata.errors import EditorError

Form = Literal["product", "half", "cells"]

HALF_FROM = 5_000
"""Keys on a CPU from which `half` is faster than `product` (`python -m benchmarks.neuron_lookup`: slower at 3,000, .7 of the time at
5,000, half or less from 10,000 on)."""
CELLS_FROM = 30_000
"""Keys on a CPU from which faiss answers, if it is installed. It is faster from 3,000 on, but `half` is exact on every query: it is kept
for as long as it takes less than 8 % of a decoded token of GPT-2 small (`python -m benchmarks.neuron_lookup`: 7.7 % at 30,000)."""
CELLS, PROBED = 512, 128
"""Centres, and how many are read per query (measured: with a quarter of them also far queries get the row of `product`)."""
_PER_CENTRE = 64
"""Keys that each centre is learnt from at most, so that building takes seconds at any size."""
_CANDIDATES = 16
"""Rows scored anew by the fixed-size forms: more equal keys than anyone stores."""
_ROUNDING = 2.0**-24
_HALF_ROUNDING, _HALF_SMALLEST = 2.0**-11, 2.0**-24


class KeyIndex:
    """The keys of a patch, ready for questions.

    Args:
        keys: [N, d], N > 0, finite; kept in float32 on their device, which answers.
        form: how to search; None chooses by size and device (`choose_form`).
        tie: scores of one query that are no farther than this below the best count as equal to it.

    Raises:
        EditorError: no keys, not a matrix, values that are not finite, or `cells` without faiss or off the CPU.
    """

    def __init__(self, keys: torch.Tensor, form: Form | None = None, tie: float = 0.0) -> None:
        if keys.ndim != 2 or not keys.numel():
            raise EditorError(f"neuron keys: expected at least one row of at least one number, found shape {list(keys.shape)}")
        self.keys = keys.detach().float().contiguous()
        self.tie = tie
        norms = self.keys.norm(dim=1)
        self._norm = float(norms.max())
        if not math.isfinite(float(norms.sum())):
            raise EditorError(f"neuron keys: expected finite values, found others in row {int((~norms.isfinite()).nonzero()[0])}")
        self.form = choose_form(len(keys), keys.device) if form is None else form
        # Counts down, so that the largest of some rows is the first of them.
        self._precedence = torch.arange(len(keys), 0, -1, dtype=torch.int32, device=keys.device)
        self._slack = _bound_rounding(self.keys.shape[1], self._norm)
        if self.form == "half":
            self._halves = self.keys.half()
            self._half_error = float((self._halves.float() - self.keys).norm(dim=1).max())
        elif self.form == "cells":
            if self.keys.device.type != "cpu" or not has_faiss():
                found = f"keys on {self.keys.device}" if has_faiss() else "no faiss (pip install 'errata[cpu]')"
                raise EditorError(f"neuron lookup: expected faiss and keys on the CPU for the form 'cells', found {found}")
            self._cells = build_cells(self.keys, CELLS, PROBED)

    def __len__(self) -> int:
        return len(self.keys)

    def find_best(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The key with the largest inner product for each query; of equal scores the first row. Where more than 16 keys are so alike that
        a float32 product cannot tell them apart, `product` compares the first 16 of them, and `cells` any 16.

        No gradient flows. `product` is traced by `torch.compile` as one graph; the other forms break it.

        Args:
            queries: [n, d], any float dtype; compared in float32.

        Returns:
            Scores [n] float32 and rows [n] int64.

        Raises:
            EditorError: queries of another width than the keys'.
        """
        queries = self._check(queries)
        found: tuple[torch.Tensor, torch.Tensor]
        if self.form == "cells":
            found = self._find_in_cells(queries)
            return found
        if self.form == "half" and len(queries) == 1:
            found = self._find_in_halves(queries[0])
            return found
        # Keys first: up to three times as fast as `queries @ keys.T` for two to eight queries on a CPU, and never slower.
        rough = (self.keys @ queries.T).T.contiguous()
        near = rough >= rough.amax(dim=1, keepdim=True) - 2 * self._slack * queries.norm(dim=1, keepdim=True) - self.tie
        # The first of those that float32 cannot tell apart. Where there are fewer, any others fill up: they score less.
        rows = torch.where(near, self._precedence, 0).topk(min(_CANDIDATES, len(self.keys)), dim=1).indices
        return self._choose(queries, rows)

    def find_several(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best `count` keys of each query (all, if there are fewer), best first, equal ones in the order of their rows. Exact in any
        form, hence slow: for explanations.

        Args:
            queries: [n, d], any float dtype; compared in float32.
            count: > 0.

        Returns:
            Scores [n, c] float32 and rows [n, c] int64, c = min(count, N).

        Raises:
            EditorError: queries of another width than the keys', or a count below 1.
        """
        queries = self._check(queries)
        if count < 1:
            raise EditorError(f"neuron lookup: expected a count of at least 1, found {count}")
        count = min(count, len(self.keys))
        scores = self.keys.new_empty(len(queries), count)
        rows = torch.empty(scores.shape, dtype=torch.int64, device=self.keys.device)
        for place, query in enumerate(queries):
            scores[place], rows[place] = rank_rows(self.keys, query, count, norm=self._norm)
        return scores, rows

    def _check(self, queries: torch.Tensor) -> torch.Tensor:
        width = self.keys.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise EditorError(f"neuron lookup: expected queries of shape [n, {width}], found {list(queries.shape)}")
        return queries.detach().to(self.keys)

    def _choose(self, queries: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The winner among candidates [n, c] in any order."""
        exact = score_rows(self.keys[rows], queries[:, None])
        best = exact.amax(dim=1)
        return best, rows.masked_fill(exact < best[:, None] - self.tie, len(self.keys)).amin(dim=1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find_in_halves(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = query.half()
        size, lost = query.norm(), (half.float() - query).norm()
        # What rounding can do to one score: of the key, of the query, of the result, and of the sum.
        error = self._half_error * size + (self._norm + self._half_error) * lost + (_HALF_ROUNDING * self._norm + self._slack) * size
        rough = (self._halves @ half).float()
        best = rough.max()
        # A result beyond float16 rules nothing out.
        floor = best if best.isfinite() else best.new_tensor(-math.inf)
        rows = _list_near(rough, floor, 2 * (error + _HALF_SMALLEST) + self.tie)
        return self._choose(query[None], rows[None])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find_in_cells(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # numpy in, numpy out: faiss reads torch's tensors only with a patch of its classes.
        _, found = self._cells.search(queries.contiguous().numpy(), _CANDIDATES)
        rows = torch.from_numpy(found)
        # Cells with fewer keys than asked for leave -1; no row at all only where the query is not a number.
        return self._choose(queries, torch.where(rows < 0, rows[:, :1], rows).clamp_min(0))


def choose_form(count: int, device: torch.device) -> Form:
    """The fastest form for `count` keys, as measured; where nothing was measured (GPUs, CPUs other than x86 with AVX2) the plain one."""
    if device.type != "cpu" or count < HALF_FROM:
        return "product"
    if count >= CELLS_FROM and has_faiss():
        return "cells"
    return "half" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "product"


def rank_rows(
    keys: torch.Tensor, query: torch.Tensor, count: int, *, norm: float, rough: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` rows with the largest inner products, best first, equal ones in their order. Exact: every row that a float32 product
    cannot rule out is scored anew.

    Args:
        keys: [N, d] float32, N >= count.
        query: [d] float32.
        norm: no row of `keys` is longer.
        rough: [N], the float32 products where they are known already; -inf bars a row.

    Returns:
        Scores [count] float32 and rows [count] int64.
    """
    rough = keys @ query if rough is None else rough
    near = _list_near(rough, rough.topk(count).values[-1], 2 * _bound_rounding(len(query), norm) * query.norm())
    exact = score_rows(keys[near], query)
    order = exact.sort(descending=True, stable=True).indices[:count]
    return exact[order], near[order]


def _bound_rounding(width: int, norm: float) -> float:
    """What a float32 product may be off by, per length of the query."""
    # Rounding errors of a dot product grow with √d (Higham & Mary 2019, with constant 4: never seen exceeded).
    return 4 * math.sqrt(width) * _ROUNDING * norm


def _list_near(rough: torch.Tensor, best: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """Rows that may reach `best`, ascending; all of them where a score is not a number."""
    return (~(rough < best - slack)).nonzero()[:, 0]


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def score_rows(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Inner products over the last dimension, float64 rounded to float32."""
    return (keys.double() * queries.double()).sum(dim=-1).float()


def build_cells(keys: torch.Tensor, cells: int, probed: int, ids: Any = None) -> Any:
    """An inverted file of `keys` [N, d]: float16, compared by inner product, which is nearness as long as all norms are equal.

    Args:
        cells: how many centres; never more than keys.
        probed: how many of them a query reads.
        ids: [N] int64 numpy, what a search names rows by; None counts them.
    """
    import faiss

    width = keys.shape[1]
    cells = min(cells, len(keys))
    centres = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(centres, width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False)
    index.cp.niter, index.cp.seed = 10, 0
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _PER_CENTRE
    index.nprobe = min(probed, cells)
    rows = keys.numpy()
    index.train(rows)
    if ids is None:
        index.add(rows)
    else:
        index.add_with_ids(rows, ids)
    return index
