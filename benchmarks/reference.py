"""The plain computation of a D4S edit, as the methods' papers write it: what every shortcut of `errata.editors.d4s` must equal.

One edit at a time; every row runs through the whole model at every step, with logits at every position; torch's own Adam; a general LU
solve. It is slow on purpose, and no part of the product imports it. Tests compare with it, `benchmarks.edit_speed` measures against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from errata.editors.rows import KL_PROMPT
from errata.edits import SLOT, Edit
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_target, find_pad, locate_subject, pad_rows
from errata.modeling.trace import change_output, trace_inputs
from errata.profiles import PrepareOptions, Site


@dataclass(frozen=True)
class PlainTarget:
    """One edit's residual, and how its optimisation ended."""

    residual: torch.Tensor
    """[d_out] float32: z − h."""
    loss: float
    target_nll: float
    steps: int


@dataclass(frozen=True)
class PlainRows:
    """Token rows of one edit: its contexts with the target behind, then the whole essence prompt."""

    ids: list[list[int]]
    sites: list[int]
    starts: list[int]
    """Per context, where its prompt ends: the first position whose next token is a target token."""
    target: list[int]


def write_rows(base: Base, edit: Edit, contexts: Sequence[str], place: Site = "subject_last") -> PlainRows:
    """Every row written out in full."""
    target = encode_target(base.tokenizer, edit.target_new)
    ids, sites, starts = [], [], []
    for context in contexts:
        before = context.replace(SLOT, edit.prompt.split(SLOT)[0])
        text = context.replace(SLOT, edit.rewrite_prompt)
        prompt, site = locate_subject(base.tokenizer, text, len(before), len(before) + len(edit.subject))
        ids.append(prompt + target[:-1])
        sites.append(site if place == "subject_last" else len(prompt) - 1)
        starts.append(len(prompt) - 1)
    essence, site = locate_subject(base.tokenizer, KL_PROMPT.replace(SLOT, edit.subject), 0, len(edit.subject))
    return PlainRows([*ids, essence], [*sites, site if place == "subject_last" else len(essence) - 1], starts, target)


@torch.no_grad()
def compute_keys(base: Base, edit: Edit, options: PrepareOptions) -> dict[int, torch.Tensor]:
    """MEMIT `compute_ks`: a forward pass of its own; the bare prompt weighs one half, the other contexts share the other."""
    rows = write_rows(base, edit, options.contexts, options.site)
    count = len(options.contexts)
    ids, mask = pad_rows(rows.ids[:count], find_pad(base.tokenizer), "right", base.device)
    modules = {layer: base.layout.projection_of(base.model, layer) for layer in options.layers}
    with trace_inputs(modules, lambda inputs: inputs.float()) as found:
        base.model(input_ids=ids, attention_mask=mask)
    keys = {}
    for layer, inputs in found.items():
        each = [inputs[row, rows.sites[row]] for row in range(count)]
        keys[layer] = each[0] if count == 1 else (each[0] + sum(each[1:]) / (count - 1)) / 2
    return keys


def compute_residual(base: Base, edit: Edit, options: PrepareOptions) -> PlainTarget:
    """MEMIT `compute_z` for one edit."""
    rows = write_rows(base, edit, options.contexts, options.site)
    count, target = len(options.contexts), torch.tensor(rows.target, device=base.device)
    ids, mask = pad_rows(rows.ids, find_pad(base.tokenizer), "right", base.device)
    top = base.layout.block(base.model, options.layers[-1])
    delta: torch.Tensor | None = None
    site_state: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def shift_sites(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal delta, site_state
        if site_state is None:
            site_state = hidden[0, rows.sites[0]].detach().float()
            delta = torch.zeros_like(site_state, requires_grad=True)
        assert delta is not None
        hidden = hidden.clone()
        for row, site in enumerate(rows.sites):
            hidden[row, site] = hidden[row, site] + delta.to(hidden.dtype)
        return hidden

    def run() -> torch.Tensor:
        with change_output(top, shift_sites):
            logits: torch.Tensor = base.model(input_ids=ids, attention_mask=mask).logits
        return logits.float().log_softmax(dim=-1)

    with torch.no_grad():
        run()
    assert site_state is not None and delta is not None
    norm = site_state.norm()
    radius = options.clamp * norm
    rate = options.lr or float(options.lr_scale * radius / (options.steps * len(site_state) ** 0.5))
    adam = torch.optim.Adam([delta], lr=rate)
    for step in range(1, options.steps + 1):
        spoken = run()
        per_context = [functional.nll_loss(spoken[row, start : start + len(target)], target) for row, start in enumerate(rows.starts)]
        nll = torch.stack(per_context).mean()
        now = spoken[count, rows.sites[count]]
        reference = now.detach() if reference is None else reference
        divergence = (reference.exp() * (reference - now)).sum()
        loss = nll + options.kl * divergence + options.weight_decay * delta.norm() / norm**2
        if loss < options.stop_loss or step == options.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > radius:
                delta.mul_(radius / delta.norm())
    return PlainTarget(delta.detach().cpu(), loss.item(), nll.item(), step)


def solve_plain(
    residuals: torch.Tensor, keys: Mapping[int, torch.Tensor], moments: Mapping[int, torch.Tensor], lam: float, share: int
) -> dict[int, torch.Tensor]:
    """`ΔW_l = R K_lᵀ (λ C_l + K_l K_lᵀ)⁻¹ / share` by LU in float64.

    Args:
        residuals: [n, d_out].
        keys: layer → [n, d_in].
        moments: layer → C [d_in, d_in].
    """
    deltas = {}
    for layer, stored in keys.items():
        k, r = stored.double().T, residuals.double().T
        system = lam * moments[layer].double() + k @ k.T
        deltas[layer] = torch.linalg.solve(system.T, (r @ k.T).T).T / share
    return deltas
