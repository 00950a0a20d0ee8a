"""Measured tries of a gate: edits read once at one layer, then asked through several θ and gains. Nothing is optimised."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from errata.calibration.gates import Gate, GateTrial
from errata.calibration.panel import Panel
from errata.editors.base import Progress
from errata.editors.ireva.editor import CHUNK_TOKENS, IReVa
from errata.edits import Edit
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.profiles import GateOptions, GatePoint, NeuronOptions, NeuronProfile


@dataclass(frozen=True)
class GateDesk:
    """The base with the edits of a search, measured over and over."""

    base: Base
    edits: tuple[Edit, ...]
    batch_tokens: int
    chunk_tokens: int = CHUNK_TOKENS
    """As `IReVa` takes it."""

    def try_gates(self, layer: int, gates: Sequence[Gate], on_progress: Progress | None = None) -> list[GateTrial]:
        """The edits as neurons of a layer, through each gate.

        Args:
            on_progress: called with the gates tried and all of them.

        Raises:
            EditorError: no edit could be prepared.
        """
        begun = time.perf_counter()
        editor = self._make_editor(layer, GateOptions())
        prepared = editor.prepare(self.base, self.edits)
        if prepared.pairs is None:
            reason = next(iter(prepared.refused.values()), "none was given")
            raise EditorError(f"expected edits that can be prepared, found none among {len(self.edits)} ({reason})")
        state = editor.merge(editor.empty_state(), prepared.pairs, None)
        trials = []
        for number, (theta, gain) in enumerate(gates):
            patch = self._make_editor(layer, GateOptions(theta=theta, gain=gain)).solve(state)
            assert patch is not None, "a state with pairs has a patch"
            answers = self._panel.ask(patch)
            seconds, begun = time.perf_counter() - begun, time.perf_counter()
            point = GatePoint(layer=layer, theta=theta, gain=gain, **answers._asdict())
            trials.append(GateTrial(point=point, edits=len(self.edits), seconds=round(seconds, 3)))
            if on_progress:
                on_progress(number + 1, len(gates))
        return trials

    def _make_editor(self, layer: int, gate: GateOptions) -> IReVa:
        profile = NeuronProfile(base=self.base.digest, prepare=NeuronOptions(layer=layer), solve=gate)
        return IReVa(profile, self.base.layout, chunk_tokens=self.chunk_tokens)

    @cached_property
    def _panel(self) -> Panel:
        return Panel(self.base, self.edits, self.batch_tokens)
