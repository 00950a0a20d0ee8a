"""Profiles to start from: the one written for the built-in base, and published values for known families, scaled to depth.

Published values were chosen for one model each (GPT-2 XL, GPT-J-6B, Llama-3-8B); on another they are a beginning, not a result.
"""

from dataclasses import dataclass, replace

from errata.builtin import BUILTIN, CONTEXTUAL
from errata.profiles import GateOptions, NeuronOptions, PrepareOptions, Spread


@dataclass(frozen=True)
class Suggestion:
    """A profile without its second moments."""

    prepare: PrepareOptions
    lam: float
    origin: str
    max_norm_ratio: float | None = None
    spread: Spread | None = None
    """None: the default for its layers."""


BUILTIN_SUGGESTION = Suggestion(
    prepare=PrepareOptions(
        layers=(BUILTIN.site - 1, BUILTIN.site),
        contexts=("{}", "The weather is fine today. {}", "I do not know. {}"),
        steps=25,
        lr_scale=1.5,
        clamp=0.75,
        weight_decay=0.5,
        kl=0.0625,
    ),
    lam=200.0,
    origin="written by hand for the built-in base, measured by benchmarks/edit_quality.py",
)

_CONTEXTUAL_SUGGESTION = replace(BUILTIN_SUGGESTION, origin="the built-in base's, measured by benchmarks/contextual_base.py")
_LATE = 46 / 47
"""iReVa writes beside layer 46 of GPT-2 XL's 48, counted from 0; 34 of 36 and 30 of 32 of the others are the same share (§3.1)."""


@dataclass(frozen=True)
class NeuronSuggestion:
    """A neuron profile without its base."""

    prepare: NeuronOptions
    solve: GateOptions
    origin: str


def suggest_builtin(source: str) -> Suggestion:
    """The profile written for a base of Errata's own.

    Args:
        source: digest of its settings. A base of other settings gets the first one's.
    """
    return _CONTEXTUAL_SUGGESTION if source == CONTEXTUAL.digest else BUILTIN_SUGGESTION


def suggest_neurons(depth: int, *, builtin: bool) -> NeuronSuggestion:
    """Published values, for a model of `depth` blocks. The published θ and gain are relative to the width, the layer to the depth; nothing
    else in them knows the model they were chosen for."""
    origin = "iReVa's values for GPT-2 XL, the layer scaled to depth; not measured on this model"
    if builtin:
        origin = "iReVa's values, the layer scaled to depth, measured by benchmarks/neuron_quality.py"
    return NeuronSuggestion(NeuronOptions(layer=round(_LATE * (depth - 1))), GateOptions(), origin)


CONTEXTS = (
    "{}",
    "The weather was fine on that day. {}",
    "Therefore it is worth saying once more. {}",
    "Because of this, we wrote it down. {}",
    "I have read about it before. {}",
    "You can find it in the book. {}",
)
"""For any model; one's own sentences suit it better (`errata.calibration.contexts`)."""


@dataclass(frozen=True)
class _Published:
    first: float
    """First edited layer as a share of the depth."""
    last: float
    lr: float
    clamp: float
    weight_decay: float
    steps: int
    lam: float
    origin: str


_PUBLISHED = {
    "gpt2": _Published(13 / 48, 17 / 48, 0.5, 0.75, 0.5, 20, 20_000, "MEMIT's values for GPT-2 XL, layers scaled to depth"),
    "gptj": _Published(3 / 28, 8 / 28, 0.5, 0.75, 0.5, 25, 15_000, "MEMIT's values for GPT-J-6B, layers scaled to depth"),
    "llama": _Published(4 / 32, 8 / 32, 0.1, 0.75, 0.5, 25, 15_000, "AlphaEdit's values for Llama-3-8B, layers scaled to depth"),
}


def choose_spread(layers: int) -> Spread:
    """The default for a number of layers, as measured by `benchmarks/spread.py`: at a λ that suits the base `refresh` writes no better than
    `even`, and its cross moments take more memory than all other sums together from four layers on."""
    return "even" if layers > 1 else "single"


def suggest_profile(family: str, depth: int) -> Suggestion | None:
    """Published values for a model of `depth` blocks; None for a family nobody has published values for."""
    published = _PUBLISHED.get(family)
    if published is None:
        return None
    first, last = round(published.first * depth), round(published.last * depth)
    prepare = PrepareOptions(
        layers=tuple(range(first, max(first, last) + 1)),
        contexts=CONTEXTS,
        steps=published.steps,
        lr=published.lr,
        clamp=published.clamp,
        weight_decay=published.weight_decay,
    )
    return Suggestion(prepare, published.lam, f"{published.origin}; not measured on this model")
