"""PMET (Li et al. 2024, xpq-tech/PMET `pmet_main.py`, `compute_zs.py`): δ for attention and for the MLP of the last edited layer at once.

Only the MLP's is written: attention's takes up, while z is optimised, what attention would otherwise push into the MLP. Everything else is
MEMIT on the drifting model, but that residuals are those of the MLP's output and that layers get 1/√(layers still to come) of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from errata.comparison.drifting import BottomUp
from errata.comparison.method import Bench
from errata.comparison.systems import Forgetful
from errata.editors.base import Preparation
from errata.editors.d4s.reading import Reading, read_base
from errata.editors.d4s.targets import Adam, Running, predict, start_running
from errata.editors.rows import EditRows
from errata.modeling.loading import Base
from errata.modeling.trace import capture_outputs, trace_inputs
from errata.profiles import PrepareOptions

STEPS, KL = 30, 1.0
"""PMET's hparams for GPT-J; all other options of z are the profile's."""
_SETTLED = 0.1
"""Weight of the NLL while the target is the model's first choice already: then it is for KL to fall."""
_SETTLED_KL = 0.01
"""The weighted KL at which such an edit is finished."""
_MLP, _ATTENTION = 0, 1


def build_pmet(bench: Bench) -> BottomUp:
    """PMET with λ of the profile."""
    options = bench.profile.prepare
    return BottomUp(
        bench,
        {layer: Forgetful(bench.moments.c[layer], bench.profile.solve.lam) for layer in options.layers},
        optimise=optimise_components,
        output=bench.base.layout.mlp_of(bench.base.model, options.layers[-1]),
        share=share_roots,
        options=options.model_copy(update={"steps": STEPS, "kl": KL}),
    )


def share_roots(left: int) -> float:
    """√ of the layers still to come, this one included: PMET writes more below than MEMIT does, which divides by their number."""
    return float(left**0.5)


def optimise_components(base: Base, rows: Sequence[EditRows], options: PrepareOptions) -> tuple[torch.Tensor, Sequence[Preparation]]:
    """δ of the MLP's output, with a δ of attention's output beside it, each edit alone although run side by side.

    Per edit: NLL of the target (a tenth of it at the step after one where every token of the target was the first choice in all
    contexts) + `kl` · KL(before ‖ now) + `weight_decay` · Σ ‖δ‖/‖output‖². Each δ stays within `clamp` · ‖output‖ of its own module. An
    edit ends below `stop_loss`, or where the target is the first choice and `kl` · KL ≤ .01; the last step only measures.

    Returns:
        [e, d] float32 δ of the MLP on the CPU, and how far each edit came; `shift` is the MLP's, of its output.
    """
    units = [[edit] for edit in rows]
    site = read_site(base, units, options.layers[-1])
    norms = torch.stack([site.mlp, site.attention], dim=1)[: len(rows) * len(rows[0].contexts) : len(rows[0].contexts)].norm(dim=2)
    radius = options.clamp * norms
    rate = options.lr_scale * radius / (options.steps * site.mlp.shape[1] ** 0.5) if options.lr is None else norms.new_full((), options.lr)
    rate = rate.expand_as(radius)
    delta = torch.zeros(len(rows), 2, site.mlp.shape[1], device=norms.device)
    adam = Adam(torch.zeros_like(delta), torch.zeros_like(delta))
    factor = torch.ones(len(rows), device=norms.device)
    measured = torch.full((len(rows), 3), float("nan"))
    running = start_running(units, site.reading)
    for step in range(1, options.steps + 1):
        moves = step < options.steps
        change = delta[running.units].requires_grad_(moves)
        with torch.set_grad_enabled(moves):
            spoken = predict(base, running, site.combine(change[running.owner]))
            if step == 1:
                running = replace(running, reference=spoken[running.essences].detach())
            nll, _ = running.measure_likelihood(spoken)
            divergence = options.kl * running.measure_divergence(spoken)
            shrink = (change.norm(dim=2) / norms[running.units].square()).sum(dim=1)
            loss = factor[running.units] * nll + divergence + options.weight_decay * shrink
        measured[running.units.cpu()] = torch.stack([loss, nll, torch.full_like(loss, step)], dim=1).detach().cpu()
        settled = find_settled(running, spoken)
        factor[running.units] = torch.where(settled, _SETTLED, 1.0)
        keep = (loss.detach() >= options.stop_loss) & ~(settled & (divergence.detach() <= _SETTLED_KL))
        if not moves or not keep.any():
            break
        (gradient,) = torch.autograd.grad(loss[keep].sum(), change)
        moving = running.units[keep]
        moved = delta[moving] - rate[moving, :, None] * adam.direct(moving, gradient[keep], step)
        delta[moving] = moved * (radius[moving] / moved.norm(dim=2).clamp(min=1e-12)).clamp(max=1)[..., None]
        if not keep.all():
            site, running = site.take(keep[running.owner]), running.take(keep)
    shifts = (delta[:, _MLP].norm(dim=1) / norms[:, _MLP]).cpu()
    notes = [Preparation(loss, nll, int(steps), float(shift)) for (loss, nll, steps), shift in zip(measured.tolist(), shifts, strict=True)]
    return delta[:, _MLP].cpu(), notes


def find_settled(running: Running, spoken: torch.Tensor) -> torch.Tensor:
    """Whether every target token of an edit is the first choice in all contexts, [a] bool, from log-probabilities [m + a, vocab]."""
    missed = spoken[: len(running.labels)].argmax(dim=1) != running.labels
    return torch.zeros(len(running.units), device=spoken.device).index_add(0, running.speaker, missed.float()) == 0


@dataclass(frozen=True)
class Site:
    """The block of the last edited layer at the sites of n rows, edit by edit, then essences, as `Reading.suffix` has them."""

    reading: Reading
    hidden: torch.Tensor
    """[n, d] output of the block."""
    mlp: torch.Tensor
    """[n, d] what its MLP adds."""
    attention: torch.Tensor
    """[n, d] what its attention adds."""
    behind: nn.Sequential | None
    """From the stream behind attention to the MLP's output; None where the MLP does not see what attention adds."""

    def combine(self, change: torch.Tensor) -> torch.Tensor:
        """How much the block's output moves [n, d] when its MLP and its attention say `change` [n, 2, d] more."""
        mlp, attention = change[:, _MLP], change[:, _ATTENTION]
        if self.behind is None:
            return mlp + attention
        before = self.hidden - self.mlp
        moved: torch.Tensor = self.behind(before + attention.to(before.dtype)) - self.mlp
        return mlp + attention + moved.float()

    def take(self, rows: torch.Tensor) -> Self:
        """The rows where the boolean `rows` [n] is true, but for `reading`, which stays whole."""
        return replace(self, hidden=self.hidden[rows], mlp=self.mlp[rows], attention=self.attention[rows])


def read_site(base: Base, units: Sequence[Sequence[EditRows]], layer: int) -> Site:
    """`read_base` at one layer, with the two parts of its block: δ at a site changes nothing of its block at any other position."""
    block, mlp = base.layout.block(base.model, layer), base.layout.mlp_of(base.model, layer)
    with trace_inputs({"block": block}, lambda inputs: inputs) as inputs, capture_outputs({"mlp": mlp}) as outputs:
        reading = read_base(base, units, [layer])
    rows, places = torch.arange(len(reading.suffix.hidden), device=base.device), reading.suffix.positions[:, 0]
    hidden, said = reading.suffix.hidden[:, 0], outputs["mlp"][rows, places]
    norm = base.layout.mlp_norm
    behind = None if norm is None else nn.Sequential(block.get_submodule(norm), mlp)
    return Site(reading, hidden, said, hidden - inputs["block"][rows, places] - said, behind)
