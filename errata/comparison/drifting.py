"""Weight editors as they are published: every edit is read from the model that earlier edits have made, and written on top of it.

D4S's own readings, z-optimisation and solver, with another bookkeeping. That is what the comparison is about.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from errata.comparison.method import Bench
from errata.comparison.systems import LayerSystem
from errata.editors.artifacts import WeightDelta
from errata.editors.base import Preparation
from errata.editors.d4s.editor import CHUNK_TOKENS, chunk_units
from errata.editors.d4s.reading import average_contexts, read_base, read_contexts
from errata.editors.d4s.targets import optimise_targets
from errata.editors.rows import EditRows, build_all_rows
from errata.edits import Edit
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.offload import read_parameter
from errata.modeling.patch import Attachable, attach
from errata.profiles import PrepareOptions

Optimise = Callable[[Base, Sequence[EditRows], PrepareOptions], tuple[torch.Tensor, Sequence[Preparation]]]
"""Residuals [e, d] on the CPU, and how far each came, from the model as it is."""


class DriftingWeights:
    """The weights of one model whose edits are written on top of each other, as float64 additions to the base."""

    def __init__(self, bench: Bench) -> None:
        self._base, self._options = bench.base, bench.profile.prepare
        self._deltas: dict[int, torch.Tensor] = {}
        self.refused: dict[str, str] = {}
        """Edit id → why it could not be tokenised, and was left out."""

    def build_rows(self, edits: Sequence[Edit]) -> list[list[EditRows]]:
        """The rows of the edits that can be tokenised, in chunks that fit in memory."""
        rows, refused = build_all_rows(self._base.tokenizer, edits, self._options.contexts, self._base.span, self._options.site)
        self.refused |= refused
        return [[rows[edit_id] for (edit_id,) in chunk] for chunk in chunk_units(rows, [(edit_id,) for edit_id in rows], CHUNK_TOKENS)]

    def attach(self) -> AbstractContextManager[None]:
        """The model with all that was written so far. Raises EditorError: a weight is not finite in the model's dtype."""
        return attach(self._base, self.build_artifacts())

    def read_weight(self, layer: int) -> torch.Tensor:
        """The base's own, [d_out, d_in] float64 on the CPU, with what was written to it."""
        weight = self._base.layout.orient(read_parameter(self._base.model, self._base.layout.weight_name(layer))).double().cpu()
        return weight + self._deltas[layer] if layer in self._deltas else weight

    def add(self, layer: int, change: torch.Tensor) -> None:
        """Write a change [d_out, d_in]. Raises EditorError: the sum is not finite."""
        total = self._deltas[layer] + change if layer in self._deltas else change.double()
        _require_finite(total.float(), f"the weights that layer {layer} is asked for")
        self._deltas[layer] = total

    def build_artifacts(self) -> Sequence[Attachable]:
        deltas = {self._base.layout.weight_name(layer): delta.float() for layer, delta in self._deltas.items()}
        return [WeightDelta(self._base.digest, deltas)] if deltas else []

    def count_bytes(self) -> int:
        """Changed weights in the model's dtype."""
        return sum(delta.numel() * self._base.model.dtype.itemsize for delta in self._deltas.values())


class BottomUp:
    """MEMIT's way through the layers: below first, and what they leave of the residual is measured again before the next one is written.

    Layer l of L is asked for `(z − now) / share(L − l)`, where `now` is what `output` says at the site under all that is written so far,
    and its keys are read there too. λ and C are those of the system; C belongs to the base and is not counted as state.
    """

    def __init__(
        self,
        bench: Bench,
        systems: Mapping[int, LayerSystem],
        *,
        optimise: Optimise,
        output: nn.Module,
        share: Callable[[int], float] = float,
        options: PrepareOptions | None = None,
    ) -> None:
        """
        Args:
            systems: one per edited layer of the profile.
            optimise: finds the residuals at `output`.
            output: where residuals are measured: the block of the last edited layer, or its MLP.
            share: number of layers that are still to come, this one included → what the residual is divided by.
            options: of z; None: the profile's.
        """
        self._base, self._layers = bench.base, bench.profile.prepare.layers
        self._weights, self._systems = DriftingWeights(bench), systems
        self._optimise, self._output, self._share = optimise, output, share
        self._options = options or bench.profile.prepare

    @property
    def refused(self) -> Mapping[str, str]:
        return self._weights.refused

    def write(self, edits: Sequence[Edit]) -> None:
        chunks = self._weights.build_rows(edits)
        if not chunks:
            return
        with self._weights.attach():
            residuals = torch.cat([optimise_finitely(self._optimise, self._base, chunk, self._options) for chunk in chunks])
        start: torch.Tensor | None = None
        for below, layer in enumerate(self._layers):
            keys, now = self._read(chunks, [layer])
            start = now if start is None else start
            left = (residuals - (now - start)) / self._share(len(self._layers) - below)
            self._weights.add(layer, self._systems[layer].solve(keys[layer], left))
        if any(system.remembers for system in self._systems.values()):
            keys, _ = self._read(chunks, self._layers)
            for layer, system in self._systems.items():
                system.remember(keys[layer])

    def build_artifacts(self) -> Sequence[Attachable]:
        return self._weights.build_artifacts()

    def count_bytes(self) -> int:
        return self._weights.count_bytes() + sum(system.count_bytes() for system in self._systems.values())

    def _read(self, chunks: Sequence[Sequence[EditRows]], layers: Sequence[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Keys [e, d_in] by layer, and outputs [e, d], of the model as it is now, on the CPU. Raises EditorError: not finite."""
        with self._weights.attach():
            parts = [read_contexts(self._base, chunk, layers, self._output) for chunk in chunks]
        keys = {layer: torch.cat([average_contexts(found[layer]).cpu() for found, _ in parts]) for layer in layers}
        outputs = torch.cat([output.cpu() for _, output in parts])
        for values in (outputs, *keys.values()):
            _require_finite(values, "what it says of the edits that are being written")
        return keys, outputs


def optimise_finitely(optimise: Optimise, base: Base, rows: Sequence[EditRows], options: PrepareOptions) -> torch.Tensor:
    """The residuals that `optimise` finds. Raises EditorError: the model says nothing finite any more."""
    residuals, notes = optimise(base, rows, options)
    _require_finite(torch.tensor([note.loss for note in notes]), "what it says of the next edit")
    return residuals


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise EditorError(f"the model is destroyed: expected finite values, found others in {what}")


def optimise_hidden(base: Base, rows: Sequence[EditRows], options: PrepareOptions) -> tuple[torch.Tensor, Sequence[Preparation]]:
    """z − h at the last edited block, each edit alone, as D4S does it on the base."""
    units = [[edit] for edit in rows]
    return optimise_targets(base, units, read_base(base, units, options.layers[-1:]), options)
