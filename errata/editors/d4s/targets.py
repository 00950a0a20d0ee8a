"""z: the hidden state at the subject's last token that makes the base say the new target (ROME §3.1 step 2, MEMIT eq. 16).

Everything is read from the base. Many edits are optimised side by side; each has its own step size, its own ball and its own end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.nn import functional

from errata.editors.base import Preparation
from errata.editors.d4s.reading import Reading
from errata.editors.d4s.rows import EditRows
from errata.editors.d4s.suffix import Suffix
from errata.modeling.loading import Base
from errata.profiles import PrepareOptions


def optimise_targets(
    base: Base, rows: Sequence[EditRows], reading: Reading, options: PrepareOptions
) -> tuple[torch.Tensor, list[Preparation]]:
    """Residuals r = z − h of edits, each minimised alone although run side by side.

    Per edit: mean NLL of the target over contexts + `kl` · KL(base ‖ now) on the token after the subject + `weight_decay` · ‖δ‖/‖h‖²,
    Adam on δ alone, projected to ‖δ‖ ≤ `clamp` · ‖h‖ after each step; ends below `stop_loss`, and the last step only measures.

    Returns:
        [e, d] float32 residuals on the CPU, and per edit how far it came.
    """
    norm = reading.site.norm(dim=1)
    radius = options.clamp * norm
    scaled = options.lr_scale * radius / (options.steps * reading.site.shape[1] ** 0.5)
    rate = scaled if options.lr is None else torch.full_like(norm, options.lr)
    delta = torch.zeros_like(reading.site)
    adam = _Adam(torch.zeros_like(delta), torch.zeros_like(delta))
    measured: dict[int, tuple[float, float, int]] = {}
    running = _start(rows, reading)
    for step in range(1, options.steps + 1):
        moves = step < options.steps
        shift = delta[running.edits].requires_grad_(moves)
        with torch.set_grad_enabled(moves):
            spoken = _predict(base, running, shift)
            if step == 1:
                running = replace(running, reference=spoken[running.essences].detach())
            nll = running.measure_likelihood(spoken)
            shrink = shift.norm(dim=1) / norm[running.edits].square()
            loss = nll + options.kl * running.measure_divergence(spoken) + options.weight_decay * shrink
        for edit, value, likelihood in zip(running.edits.tolist(), loss.tolist(), nll.tolist(), strict=True):
            measured[edit] = (value, likelihood, step)
        keep = loss.detach() >= options.stop_loss
        if not moves or not keep.any():
            break
        (gradient,) = torch.autograd.grad(loss[keep].sum(), shift)
        moving = running.edits[keep]
        moved = delta[moving] - rate[moving, None] * adam.direct(moving, gradient[keep], step)
        delta[moving] = moved * (radius[moving] / moved.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]
        if not keep.all():
            running = running.take(keep)
    shifts = (delta.norm(dim=1) / norm).tolist()
    return delta.cpu(), [Preparation(*measured[edit], shift=shifts[edit]) for edit in range(len(rows))]


@dataclass(frozen=True)
class _Adam:
    """Adam's moments for every edit of a call, [e, d] each; only the edits still moving are updated."""

    first: torch.Tensor
    second: torch.Tensor

    def direct(self, moving: torch.Tensor, gradient: torch.Tensor, step: int) -> torch.Tensor:
        """Direction [a, d] of step `step` (from 1) for the edits `moving` [a], with β = (.9, .999) and ε = 1e-8."""
        self.first[moving] = 0.9 * self.first[moving] + 0.1 * gradient
        self.second[moving] = 0.999 * self.second[moving] + 0.001 * gradient.square()
        return (self.first[moving] / (1 - 0.9**step)) / ((self.second[moving] / (1 - 0.999**step)).sqrt() + 1e-8)


@dataclass(frozen=True)
class _Running:
    """The a edits still being optimised. Predictions are rows of one table: m of target tokens, then one per edit of its essence."""

    edits: torch.Tensor
    """[a] their indices in the whole call."""
    suffix: Suffix
    owner: torch.Tensor
    """[n] row of `suffix` → its edit, as an index into `edits`."""
    rows: torch.Tensor
    """[m + a] row of `suffix` that predicts."""
    columns: torch.Tensor
    """[m + a] column of `suffix` that predicts."""
    labels: torch.Tensor
    """[m] the target token."""
    weights: torch.Tensor
    """[m] 1 / (contexts · target tokens) of its edit, so that a plain sum per edit is the mean of means."""
    reference: torch.Tensor
    """[a, vocab] log-probabilities of the base after the subject."""

    @property
    def essences(self) -> slice:
        return slice(len(self.labels), None)

    def measure_likelihood(self, spoken: torch.Tensor) -> torch.Tensor:
        """NLL of the targets [a] from log-probabilities [m + a, vocab]."""
        count = len(self.labels)
        losses = functional.nll_loss(spoken[:count], self.labels, reduction="none") * self.weights
        return torch.zeros(len(self.edits), device=spoken.device).index_add(0, self.owner[self.rows[:count]], losses)

    def measure_divergence(self, spoken: torch.Tensor) -> torch.Tensor:
        """KL(base ‖ now) [a] on the token after the subject."""
        return functional.kl_div(spoken[self.essences], self.reference, reduction="none", log_target=True).sum(dim=1)

    def take(self, keep: torch.Tensor) -> Self:
        """The edits where the boolean `keep` [a] is true."""
        kept = keep[self.owner]
        places = kept[self.rows]
        tokens = places[: len(self.labels)]
        renumbered = kept.cumsum(0) - 1
        return replace(
            self,
            edits=self.edits[keep],
            suffix=self.suffix.take(kept.nonzero().squeeze(1)),
            owner=(keep.cumsum(0) - 1)[self.owner[kept]],
            rows=renumbered[self.rows[places]],
            columns=self.columns[places],
            labels=self.labels[tokens],
            weights=self.weights[tokens],
            reference=self.reference[keep],
        )


def _start(rows: Sequence[EditRows], reading: Reading) -> _Running:
    """All edits, without the reference, which the first prediction gives."""
    owner = [index for index, edit in enumerate(rows) for _ in edit.contexts]
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    weights: list[float] = []
    for row, context in enumerate(context for edit in rows for context in edit.contexts):
        edit = rows[owner[row]]
        places += [(row, position - context.site) for position in context.predicts]
        labels += edit.target
        weights += [1 / (len(edit.contexts) * len(edit.target))] * len(edit.target)
    owner += [index for index, row in enumerate(reading.essences) if row >= len(owner)]
    places += [(row, 0) for row in reading.essences]
    device = reading.site.device
    return _Running(
        edits=torch.arange(len(rows), device=device),
        suffix=reading.suffix,
        owner=torch.tensor(owner, device=device),
        rows=torch.tensor([row for row, _ in places], device=device),
        columns=torch.tensor([column for _, column in places], device=device),
        labels=torch.tensor(labels, device=device),
        weights=torch.tensor(weights, device=device),
        reference=torch.empty(0, device=device),
    )


def _predict(base: Base, running: _Running, shift: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [m + a, vocab] float32 of what follows the places of `running`, at `shift` [a, d]."""
    states = running.suffix.run(base.model, base.layout, shift[running.owner], running.rows, running.columns)
    logits: torch.Tensor = base.model.get_submodule(base.layout.head)(base.model.get_submodule(base.layout.norm)(states))
    return logits.float().log_softmax(dim=-1)
