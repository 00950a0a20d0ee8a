"""Training neurons after they were initialised (iReVa §4.2, eq. 7–11; `kv/kn_trainer.py`), many at once, each against the base alone.

The published code trains one neuron at a time, with all earlier ones summed in: hours for ten thousand edits, and an outcome that depends
on their order. Only the blocks above the neuron's layer are run again at each step, at one position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from errata.editors.neurons import find_bias, find_scale, open_gate
from errata.modeling.loading import Base
from errata.modeling.suffix import cut_suffixes
from errata.profiles import Retrofit


@dataclass(frozen=True)
class Untrained:
    """Neurons as they are initialised, and where they will answer."""

    keys: torch.Tensor
    """[m, d] float32: standardised inputs of the MLP."""
    values: torch.Tensor
    """[m, d] float32."""
    targets: torch.Tensor
    """[m] token ids."""
    rows: torch.Tensor
    """[m] row of `hidden`."""
    places: torch.Tensor
    """[m] position in it."""
    hidden: torch.Tensor
    """[n, longest, d] output of the layer's block on the base, for rows padded on the right."""


def retrofit_neurons(
    base: Base, layer: int, options: Retrofit, untrained: Untrained, strangers: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per neuron: CE of its token with the neuron at work + `reconstruction` · (x·k − x·k⁰)² + `irrelevance` · mean max(0, x_out·k − b)
    over its out-of-scope states, by AdamW on key and value. The paper's eq. 10 has a stray minus (algorithms.md, Part 5).

    Args:
        strangers: per neuron, out-of-scope states [s, d] float32.

    Returns:
        Keys and values [m, d] float32, and the NLL of each target token [m] with its trained neuron at work.
    """
    count, width = untrained.keys.shape
    above = range(layer + 1, base.layout.count_layers(base.model))
    sites = untrained.places.tolist()
    # A row per neuron: what follows its token is not run at all.
    suffix = cut_suffixes(base.model, base.layout, untrained.hidden[untrained.rows], above, sites, [site + 1 for site in sites])
    every, column = torch.arange(count, device=untrained.keys.device), torch.zeros(count, dtype=torch.long, device=untrained.keys.device)
    bias, scale = find_bias(options.theta, width), find_scale(options.theta, options.gain, width)
    owner = torch.tensor([number for number, states in enumerate(strangers) for _ in states], device=untrained.keys.device)
    outside = torch.cat(list(strangers)).to(untrained.keys.device)
    shares = torch.tensor([1 / len(states) for states in strangers], device=untrained.keys.device)
    keys, values = (tensor.clone().requires_grad_() for tensor in (untrained.keys, untrained.values))

    def measure() -> torch.Tensor:
        activations = open_gate((untrained.keys * keys).sum(dim=1) - bias, silent=False)
        states = suffix.run(base.model, base.layout, scale * activations[:, None] * values, every, column)
        logits = base.model.get_submodule(base.layout.head)(base.model.get_submodule(base.layout.norm)(states))
        return functional.cross_entropy(logits.float(), untrained.targets, reduction="none")

    # Each neuron has its own loss; AdamW divides by its own moments, entry by entry, so that their sum trains each alone.
    optimiser = torch.optim.AdamW([keys, values], lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(options.steps):
        with torch.enable_grad():
            drift = (untrained.keys * (keys - untrained.keys)).sum(dim=1).square()
            heard = ((outside * keys[owner]).sum(dim=1) - bias).clamp(min=0)
            noise = torch.zeros_like(shares).index_add(0, owner, heard) * shares
            loss = measure() + options.reconstruction * drift + options.irrelevance * noise
            keys.grad, values.grad = torch.autograd.grad(loss.sum(), (keys, values))
        optimiser.step()
    with torch.no_grad():
        losses = measure()
    return keys.detach(), values.detach(), losses
