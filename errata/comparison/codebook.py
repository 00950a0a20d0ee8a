"""GRACE as a method of the comparison: a code book of activations beside one layer (Hartvigsen et al., NeurIPS 2023; algorithms.md §6).

A code answers at the token that the next one is predicted from, where the input of the layer's projection lies within its radius: its
value then stands instead of what the projection says. Every decoded token is looked up by itself, as the published code does it when it
generates; with the positions that predict a target active (`errata.modeling.beside`), a forced target is read as decoding would give it.
A code is trained to give the whole target from the last token of the prompt on.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from errata.comparison.method import Bench, Recipe
from errata.editors.d4s.reading import Reading, read_base, read_keys
from errata.editors.rows import EditRows, build_rows
from errata.edits import Edit
from errata.errors import EditorError, TokenizationError
from errata.modeling.beside import respond_beside
from errata.modeling.loading import Base
from errata.modeling.patch import require_untouched
from errata.modeling.trace import trace_inputs

STEPS, LR = 100, 1.0
RADIUS = 0.1
"""First radius of a code, as a share of the median distance between keys of different prompts. Published: 1, in the units of one model."""
_ENOUGH = 0.01
"""Nats per token of the target; a code is trained no further."""
_SLACK = 1e-3
"""Of the first radius. One prompt that is read twice, in other company, gives keys that differ by their rounding."""
_SCALED = 200
"""Prompts of the pool that the median is taken over."""
_CHUNK = 64
"""Edits whose values are trained side by side."""


@dataclass(frozen=True)
class CodeBook:
    """All codes, on the base's device."""

    base: str
    """Digest of the base it may be put on."""
    layer: int
    keys: torch.Tensor
    """[n, d_in] float32."""
    values: torch.Tensor
    """[n, d_out] float32."""
    radii: torch.Tensor
    """[n] float32."""
    slack: float

    @property
    def deltas(self) -> Mapping[str, torch.Tensor]:
        """None: every weight stays as it is."""
        return {}

    def attach(self, base: Base) -> AbstractContextManager[None]:
        """See `errata.modeling.beside.respond_beside`."""
        mlp, projection = base.layout.mlp_of(base.model, self.layer), base.layout.projection_of(base.model, self.layer)

        def respond(x: torch.Tensor) -> torch.Tensor:
            # The class's own forward: that of the instance is the one that asks.
            with trace_inputs({"key": projection}, lambda inputs: inputs[0], stop=True) as found:
                type(mlp).forward(mlp, x[None])
            keys = found["key"]
            nearest, codes = _measure_distances(keys.float(), self.keys).min(dim=1)
            within = nearest <= self.radii[codes] + self.slack
            return torch.where(within[:, None], self.values[codes] - projection(keys).float(), 0.0)

        return respond_beside(base, self.layer, respond)


@dataclass(eq=False)
class Code:
    """One entry."""

    key: torch.Tensor
    """[d_in] float32."""
    value: torch.Tensor
    """[d_out] float32."""
    radius: float
    label: tuple[int, ...]
    """Ids of the target."""
    slots: set[str] = field(default_factory=set)
    """Of the edits that it answers."""


class Grace:
    """The code book of a stream."""

    def __init__(self, base: Base, layer: int, radius: float, seed: int) -> None:
        """
        Args:
            radius: the first of a code, in units of its key.
        """
        self._base, self._layer, self._radius = base, layer, radius
        self._draw = torch.Generator().manual_seed(seed)
        self.codes: list[Code] = []
        self.refused: dict[str, str] = {}

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`. Raises EditorError: an answer is not finite."""
        require_untouched(self._base)
        latest = {edit.slot: edit for edit in edits}
        rows: dict[str, EditRows] = {}
        for slot, edit in latest.items():
            try:
                rows[slot] = build_rows(self._base.tokenizer, edit, ("{}",), self._base.span, "prompt_last")
            except TokenizationError as error:
                self.refused[edit.edit_id] = str(error)
        slots = list(rows)
        for start in range(0, len(slots), _CHUNK):
            chosen = slots[start : start + _CHUNK]
            reading = read_base(self._base, [[rows[slot]] for slot in chosen], [self._layer])
            keys = reading.keys[self._layer]
            codes = [self._place(slot, key, tuple(rows[slot].target)) for slot, key in zip(chosen, keys, strict=True)]
            self._train(codes, [rows[slot] for slot in chosen], reading)

    def build_artifacts(self) -> list[CodeBook]:
        """See `Method.build_artifacts`."""
        if not self.codes:
            return []
        keys, values = (torch.stack([getattr(code, name) for code in self.codes]) for name in ("key", "value"))
        radii = torch.tensor([code.radius for code in self.codes], device=keys.device)
        return [CodeBook(self._base.digest, self._layer, keys, values, radii, _SLACK * self._radius)]

    def count_bytes(self) -> int:
        """Keys, values and radii in float32, labels in int64."""
        return sum(4 * (len(code.key) + len(code.value) + 1) + 8 * len(code.label) for code in self.codes)

    def _place(self, slot: str, key: torch.Tensor, label: tuple[int, ...]) -> Code:
        """The code that is to answer a key: an old one of the same label nearby, which then reaches as far, or a new one, which shares the
        room with an old one of another label."""
        self._leave(slot)
        radius = self._radius
        if self.codes:
            distances = _measure_distances(key[None], torch.stack([code.key for code in self.codes]))[0]
            near, distance = self.codes[int(distances.argmin())], float(distances.min())
            if distance <= self._radius + near.radius:
                if near.label == label:
                    near.radius = max(near.radius, distance)
                    near.slots.add(slot)
                    return near
                near.radius, radius = min(near.radius, distance / 2), min(radius, distance / 2)
        width = self._base.layout.read_weight(self._base.model, self._layer).shape[0]
        value = torch.rand(width, generator=self._draw).to(key.device)
        self.codes.append(Code(key.clone(), value, radius, label, {slot}))
        return self.codes[-1]

    def _leave(self, slot: str) -> None:
        """Drop what answered an earlier edit of the slot, where it answers no other."""
        for code in self.codes:
            code.slots.discard(slot)
        self.codes = [code for code in self.codes if code.slots]

    def _train(self, codes: Sequence[Code], rows: Sequence[EditRows], reading: Reading) -> None:
        """Minimise each code's mean NLL over the edits that it answers, starting where it is. Its best value is kept."""
        base, distinct = self._base, list(dict.fromkeys(codes))
        device = reading.site.device
        code_of = torch.tensor([distinct.index(code) for code in codes], device=device)
        shares = 1 / torch.bincount(code_of).float()
        lines = torch.tensor([line for line, row in enumerate(rows) for _ in row.target], device=device)
        columns = torch.tensor([at - row.contexts[0].site for row in rows for at in row.contexts[0].predicts], device=device)
        wanted = torch.tensor([token for row in rows for token in row.target], device=device)
        weights = torch.tensor([1 / len(row.target) for row in rows for _ in row.target], device=device) * shares[code_of[lines]]
        suffix = reading.suffix.take(torch.arange(len(rows), device=device))
        with torch.no_grad():
            plain = base.layout.projection_of(base.model, self._layer)(reading.keys[self._layer].to(suffix.hidden.dtype)).float()
        values = torch.stack([code.value for code in distinct]).requires_grad_()
        best, least = values.detach().clone(), torch.full((len(distinct),), torch.inf, device=device)
        adam = torch.optim.Adam([values], lr=LR)
        norm, head = (base.model.get_submodule(path) for path in (base.layout.norm, base.layout.head))
        for step in range(STEPS + 1):
            states = suffix.run(base.model, base.layout, values[code_of] - plain, lines, columns)
            each = functional.cross_entropy(head(norm(states)).float(), wanted, reduction="none") * weights
            losses = torch.zeros(len(distinct), device=device).index_add(0, code_of[lines], each)
            if not torch.isfinite(losses).all():
                raise EditorError("grace: expected a finite loss, found another")
            better = losses.detach() < least
            best[better], least[better] = values.detach()[better], losses.detach()[better]
            if step == STEPS or bool((least < _ENOUGH).all()):
                break
            adam.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
        for code, value in zip(distinct, best, strict=True):
            code.value = value.clone()


def find_radius(base: Base, layer: int, pool: Sequence[Edit]) -> float:
    """The first radius of codes, from the keys of prompts that nothing is written about.

    Raises:
        EditorError: fewer than two of them can be read.
    """
    rows = []
    for edit in pool[:_SCALED]:
        try:
            rows.append(build_rows(base.tokenizer, edit, ("{}",), base.span, "prompt_last"))
        except TokenizationError:
            continue
    if len(rows) < 2:
        raise EditorError(f"grace: expected at least two prompts of the pool that tell how far keys lie apart, found {len(rows)}")
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    keys = torch.cat([read_keys(base, [[row] for row in chunk], layer) for chunk in chunks])
    return RADIUS * float(functional.pdist(keys).median())


def _measure_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[m, n] Euclidean. Not by a matrix product, which near 0 is nothing but rounding."""
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def start_grace(bench: Bench) -> Grace:
    layer = bench.profile.prepare.layers[-1]
    return Grace(bench.base, layer, find_radius(bench.base, layer, bench.pool), bench.seed)


GRACE_RECIPE = Recipe(
    name="grace",
    title="GRACE",
    source="Aging with GRACE, NeurIPS 2023 (Thartvigsen/GRACE; zjunlp/EasyEdit: easyeditor/models/grace)",
    build=start_grace,
    differs="at the profile's last layer; the first radius is a tenth of the median distance between keys; labels are compared token by "
    "token, not by their mean; splitting never widens a radius; the best value of the training is kept, which ends early; values of a "
    "batch are trained side by side; a re-edit drops the code that only it had",
)
