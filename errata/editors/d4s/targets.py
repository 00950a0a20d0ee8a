"""z: the hidden state at the subject's last token that makes the base say the new target (ROME §3.1 step 2, MEMIT eq. 16).

Everything is read from the base. Many edits are optimised side by side; each has its own step size, its own ball and its own end. Edits
that share a pair (see `groups`) are one unit with one δ, which all their prompts have to live with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.nn import functional

from errata.editors.base import Preparation
from errata.editors.d4s.reading import Reading
from errata.editors.rows import EditRows
from errata.modeling.loading import Base
from errata.modeling.suffix import Suffix
from errata.profiles import PrepareOptions


def optimise_targets(
    base: Base, units: Sequence[Sequence[EditRows]], reading: Reading, options: PrepareOptions
) -> tuple[torch.Tensor, list[Preparation]]:
    """Residuals r = z − h of units of edits, each minimised alone although run side by side.

    Per unit: mean NLL of the target over contexts, and over the edits of the unit, + `kl` · KL(base ‖ now) on the token after the
    subject + `weight_decay` · ‖δ‖/‖h‖², Adam on δ alone, projected to ‖δ‖ ≤ `clamp` · √edits · ‖h‖ after each step; ends below
    `stop_loss`, and the last step only measures.

    Returns:
        [u, d] float32 residuals on the CPU, and per edit, unit by unit, how far it came.
    """
    norm = reading.site.norm(dim=1)
    # m facts in one vector need the room of m vectors at right angles.
    radius = options.clamp * norm * torch.tensor([len(unit) ** 0.5 for unit in units], device=norm.device)
    scaled = options.lr_scale * radius / (options.steps * reading.site.shape[1] ** 0.5)
    rate = scaled if options.lr is None else torch.full_like(norm, options.lr)
    delta = torch.zeros_like(reading.site)
    adam = Adam(torch.zeros_like(delta), torch.zeros_like(delta))
    measured: dict[int, tuple[float, int]] = {}
    likelihoods = torch.zeros(sum(map(len, units)))
    running = start_running(units, reading)
    for step in range(1, options.steps + 1):
        moves = step < options.steps
        shift = delta[running.units].requires_grad_(moves)
        with torch.set_grad_enabled(moves):
            spoken = predict(base, running, shift[running.owner])
            if step == 1:
                running = replace(running, reference=spoken[running.essences].detach())
            nll, each = running.measure_likelihood(spoken)
            shrink = shift.norm(dim=1) / norm[running.units].square()
            loss = nll + options.kl * running.measure_divergence(spoken) + options.weight_decay * shrink
        measured |= {unit: (value, step) for unit, value in zip(running.units.tolist(), loss.tolist(), strict=True)}
        likelihoods[running.edits.cpu()] = each.detach().cpu()
        keep = loss.detach() >= options.stop_loss
        if not moves or not keep.any():
            break
        (gradient,) = torch.autograd.grad(loss[keep].sum(), shift)
        moving = running.units[keep]
        moved = delta[moving] - rate[moving, None] * adam.direct(moving, gradient[keep], step)
        delta[moving] = moved * (radius[moving] / moved.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]
        if not keep.all():
            running = running.take(keep)
    shifts = (delta.norm(dim=1) / norm).tolist()
    notes: list[Preparation] = []
    for index, unit in enumerate(units):
        total, steps = measured[index]
        notes += [Preparation(total, float(likelihoods[len(notes) + place]), steps, shifts[index]) for place in range(len(unit))]
    return delta.cpu(), notes


@dataclass(frozen=True)
class Adam:
    """Adam's moments for every edit of a call, [e, …] each; only the edits still moving are updated."""

    first: torch.Tensor
    second: torch.Tensor

    def direct(self, moving: torch.Tensor, gradient: torch.Tensor, step: int) -> torch.Tensor:
        """Direction [a, …] of step `step` (from 1) for the edits `moving` [a], with β = (.9, .999) and ε = 1e-8."""
        self.first[moving] = 0.9 * self.first[moving] + 0.1 * gradient
        self.second[moving] = 0.999 * self.second[moving] + 0.001 * gradient.square()
        return (self.first[moving] / (1 - 0.9**step)) / ((self.second[moving] / (1 - 0.999**step)).sqrt() + 1e-8)


@dataclass(frozen=True)
class Running:
    """The a units still being optimised, and their b edits. Predictions are rows of one table: m of target tokens, then one per unit of
    its essence."""

    units: torch.Tensor
    """[a] their indices in the whole call."""
    edits: torch.Tensor
    """[b] likewise."""
    unit_of: torch.Tensor
    """[b] edit → its unit, as an index into `units`."""
    shares: torch.Tensor
    """[b] 1 / edits of its unit."""
    suffix: Suffix
    owner: torch.Tensor
    """[n] row of `suffix` → its unit, as an index into `units`."""
    rows: torch.Tensor
    """[m + a] row of `suffix` that predicts."""
    columns: torch.Tensor
    """[m + a] column of `suffix` that predicts."""
    labels: torch.Tensor
    """[m] the target token."""
    speaker: torch.Tensor
    """[m] its edit, as an index into `edits`."""
    weights: torch.Tensor
    """[m] 1 / (contexts · target tokens) of its edit, so that a plain sum per edit is the mean of means."""
    reference: torch.Tensor
    """[a, vocab] log-probabilities of the base after the subject."""

    @property
    def essences(self) -> slice:
        return slice(len(self.labels), None)

    def measure_likelihood(self, spoken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL of the targets per unit [a] and per edit [b], from log-probabilities [m + a, vocab]."""
        losses = functional.nll_loss(spoken[: len(self.labels)], self.labels, reduction="none") * self.weights
        each = torch.zeros(len(self.edits), device=spoken.device).index_add(0, self.speaker, losses)
        return torch.zeros(len(self.units), device=spoken.device).index_add(0, self.unit_of, each * self.shares), each

    def measure_divergence(self, spoken: torch.Tensor) -> torch.Tensor:
        """KL(base ‖ now) [a] on the token after the subject."""
        return functional.kl_div(spoken[self.essences], self.reference, reduction="none", log_target=True).sum(dim=1)

    def take(self, keep: torch.Tensor) -> Self:
        """The units where the boolean `keep` [a] is true."""
        kept, edits = keep[self.owner], keep[self.unit_of]
        places = kept[self.rows]
        tokens = places[: len(self.labels)]
        renumbered = keep.cumsum(0) - 1
        return replace(
            self,
            units=self.units[keep],
            edits=self.edits[edits],
            unit_of=renumbered[self.unit_of[edits]],
            shares=self.shares[edits],
            suffix=self.suffix.take(kept.nonzero().squeeze(1)),
            owner=renumbered[self.owner[kept]],
            rows=(kept.cumsum(0) - 1)[self.rows[places]],
            columns=self.columns[places],
            labels=self.labels[tokens],
            speaker=(edits.cumsum(0) - 1)[self.speaker[tokens]],
            weights=self.weights[tokens],
            reference=self.reference[keep],
        )


def start_running(units: Sequence[Sequence[EditRows]], reading: Reading) -> Running:
    """All units, without the reference, which the first prediction gives."""
    edits = [(index, edit) for index, unit in enumerate(units) for edit in unit]
    owner: list[int] = []
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    speaker: list[int] = []
    weights: list[float] = []
    for number, (unit, edit) in enumerate(edits):
        for context in edit.contexts:
            places += [(len(owner), position - context.site) for position in context.predicts]
            labels += edit.target
            speaker += [number] * len(edit.target)
            weights += [1 / (len(edit.contexts) * len(edit.target))] * len(edit.target)
            owner.append(unit)
    owner += [index for index, row in enumerate(reading.essences) if row >= len(owner)]
    places += [(row, 0) for row in reading.essences]
    device = reading.site.device
    return Running(
        units=torch.arange(len(units), device=device),
        edits=torch.arange(len(edits), device=device),
        unit_of=torch.tensor([unit for unit, _ in edits], device=device),
        shares=torch.tensor([1 / len(units[unit]) for unit, _ in edits], device=device),
        suffix=reading.suffix,
        owner=torch.tensor(owner, device=device),
        rows=torch.tensor([row for row, _ in places], device=device),
        columns=torch.tensor([column for _, column in places], device=device),
        labels=torch.tensor(labels, device=device),
        speaker=torch.tensor(speaker, device=device),
        weights=torch.tensor(weights, device=device),
        reference=torch.empty(0, device=device),
    )


def predict(base: Base, running: Running, shift: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [m + a, vocab] float32 of what follows the places of `running`, with `shift` [n, d] added at its rows' sites."""
    states = running.suffix.run(base.model, base.layout, shift, running.rows, running.columns)
    logits: torch.Tensor = base.model.get_submodule(base.layout.head)(base.model.get_submodule(base.layout.norm)(states))
    return logits.float().log_softmax(dim=-1)
