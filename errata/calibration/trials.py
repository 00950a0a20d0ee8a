"""One measured try: edits written into the base at one place, with one set of options, over several λ."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch

from errata.calibration.panel import Panel
from errata.calibration.records import Record
from errata.editors.base import Pairs, Progress
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.edits import Edit
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.monitors.norms import measure_norms
from errata.profiles import PrepareOptions, Profile, SolveOptions, Spread

_REACHED = 0.5
"""Nats per token of a target up to which its z counts as found."""


class Trial(Record):
    """What one set of options did to the same edits as all others of its search."""

    prepare: PrepareOptions
    lam: float
    spread: Spread
    edits: int
    """Written at once; those that no pair could be made of count as failed."""
    fit: float
    """Median ρ: the fraction of its residual that an edit realises."""
    reached: float
    """Share of edits whose z says the target."""
    efficacy: float
    generalization: float | None
    """Over all paraphrases; None where the edits have none."""
    specificity: float | None
    """Agreement with the base over all neighbours; None where the edits have none."""
    score: float
    """Harmonic mean of those three that there are."""
    norm_ratio: float
    """mean |W| / mean |W0| of the layer that grew most."""
    seconds: float
    """Of writing and measuring; what several λ share is counted with the first of them."""


@dataclass(frozen=True)
class Desk:
    """The base with the edits of a search, measured over and over."""

    base: Base
    moments: Moments
    edits: tuple[Edit, ...]
    batch_tokens: int
    limits: Mapping[str, Any] = field(default_factory=dict)
    """What an editor may use of this machine, as `D4S` takes it."""

    def try_options(
        self,
        prepare: PrepareOptions,
        spreads: Sequence[Spread],
        fits: Sequence[float],
        on_progress: Progress | None = None,
        lambdas: Iterable[float] = (),
    ) -> list[Trial]:
        """Prepare the edits once and solve them under every spread at the λ that give each of `fits` as their median ρ (under `even`:
        spreads are compared at equal λ), and at `lambdas`.

        Raises:
            EditorError: no edit could be prepared, or a system is singular.
        """
        begun = time.perf_counter()
        editor = self._make_editor(prepare, spreads[0], 1.0)
        prepared = editor.prepare(self.base, self.edits, on_progress)
        if prepared.pairs is None:
            reason = next(iter(prepared.refused.values()), "none was given")
            raise EditorError(f"expected edits that can be prepared, found none among {len(self.edits)} ({reason})")
        reached = sum(note.target_nll <= _REACHED for note in prepared.notes.values()) / len(self.edits)
        found = [editor.find_lambda(prepared.pairs, fit) for fit in fits]
        trials: list[Trial] = []
        for spread in spreads:
            for lam in dict.fromkeys((*found, *lambdas)):
                measured = self._measure(self._make_editor(prepare, spread, lam), prepared.pairs)
                seconds, begun = time.perf_counter() - begun, time.perf_counter()
                trials.append(
                    Trial(
                        prepare=prepare,
                        lam=lam,
                        spread=spread,
                        edits=len(self.edits),
                        reached=reached,
                        seconds=round(seconds, 3),
                        **measured,
                    )
                )
        return trials

    def measure_growth(self, trial: Trial, counts: Sequence[int]) -> list[tuple[int, float]]:
        """(edits, mean |W| / mean |W0| of the layer that grew most) for the first edits of the desk."""
        editor = self._make_editor(trial.prepare, trial.spread, trial.lam)
        prepared = editor.prepare(self.base, self.edits)
        if prepared.pairs is None:
            return []
        sizes = [count for count in counts if count <= len(prepared.pairs)]
        return [(count, self._measure_norm(editor, prepared.pairs.take(range(count)))) for count in sizes]

    def _measure(self, editor: D4S, pairs: Pairs) -> dict[str, Any]:
        state = editor.merge(editor.empty_state(), pairs, None)
        artifact = editor.solve(state)
        assert artifact is not None, "a state with pairs has an artifact"
        fit = median(editor.measure_fits(state, pairs).tolist())
        answers = self._panel.ask(artifact)
        return {"fit": fit, "norm_ratio": _grown(self.base, artifact.deltas), **answers._asdict()}

    def _measure_norm(self, editor: D4S, pairs: Pairs) -> float:
        artifact = editor.solve(editor.merge(editor.empty_state(), pairs, None))
        assert artifact is not None, "a state with pairs has an artifact"
        return _grown(self.base, artifact.deltas)

    def _make_editor(self, prepare: PrepareOptions, spread: Spread, lam: float) -> D4S:
        return self._editor.change(self._write_profile(prepare, SolveOptions(lam=lam, spread=spread, moments="")))

    @cached_property
    def _editor(self) -> D4S:
        """One that every other comes from, so that C is factored once per layer."""
        layer = min(self.moments.c)
        options = PrepareOptions(layers=(layer,))
        profile = self._write_profile(options, SolveOptions(lam=1.0, spread="single", moments=""))
        return D4S(profile, self.moments, self.base.layout, **self.limits)

    def _write_profile(self, prepare: PrepareOptions, solve: SolveOptions) -> Profile:
        return Profile(base=self.base.digest, prepare=prepare, solve=solve)

    @cached_property
    def _panel(self) -> Panel:
        return Panel(self.base, self.edits, self.batch_tokens)


def _grown(base: Base, deltas: Mapping[str, torch.Tensor]) -> float:
    return max(norms.mean_abs_ratio or 0.0 for norms in measure_norms(base, deltas))
