"""A profile: where and how strongly an editor writes into one base model (design §5).

The `prepare` part decides what a pair is; changing it needs a rebase. The `solve` part decides how stored pairs become an artifact;
changing it only needs a new solve. Each editor has a profile of its own kind: `Profile` is D4S's, `NeuronProfile` iReVa's.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer, model_validator

from errata.edits import canonical_json, digest_of
from errata.errors import InputError

Site = Literal["subject_last", "prompt_last"]
Spread = Literal["single", "even", "refresh", "d4s_code"]


def spell_layers(layers: Sequence[int]) -> str:
    """Layers that lie side by side, for people."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


class PrepareOptions(BaseModel):
    """How an edit becomes a pair (key, residual). Names and published values: MEMIT's hparams, algorithms.md §1.2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Edited layers, ascending. Residuals are taken at the output of the last one."""
    site: Site = "subject_last"
    """Token of the prompt at which keys are read and δ is added: the last one of the subject, or of the whole prompt."""
    contexts: tuple[str, ...] = Field(default=("{}",), min_length=1)
    """Prefix templates, each with one `{}` for the prompt. The bare `{}` comes first. Frozen, so that keys can be reproduced."""
    steps: int = Field(default=25, ge=2)
    """Optimisation steps of z; the last one only measures."""
    lr: float | None = Field(default=None, gt=0)
    """Adam step size of δ in hidden units. None: `lr_scale · clamp · ‖h‖ / (steps · √d)`, which suits any hidden norm."""
    lr_scale: float = Field(default=1.5, gt=0)
    clamp: float = Field(default=0.75, gt=0)
    """Radius of the ball δ may not leave, as a multiple of ‖h‖."""
    weight_decay: float = Field(default=0.5, ge=0)
    """Weight of ‖δ‖ / ‖h‖² in the loss."""
    kl: float = Field(default=0.0625, ge=0)
    """Weight of KL(base ‖ now) on the token after the subject."""
    stop_loss: float = Field(default=0.05, ge=0)
    """An edit whose loss falls below this is finished."""
    keying: Literal["frozen", "cascade"] = "frozen"
    """Where the keys of layers above the first are read: on the base, or, as published, on the base with the layers below already written,
    which makes a pair depend on what was live when it was prepared."""

    @model_serializer(mode="wrap")
    def _omit_usual(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Options from before there was another site, or other keys, keep their digest."""
        content: dict[str, Any] = spell(self)
        usual = {"site": "subject_last", "keying": "frozen"}
        return {name: value for name, value in content.items() if usual.get(name, ...) != value}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected ascending distinct layers, found {list(self.layers)}")
        if self.contexts[0] != "{}":
            raise ValueError(f"contexts: expected the bare '{{}}' first, found {self.contexts[0]!r}")
        for context in self.contexts:
            if context.count("{}") != 1 or not context.endswith("{}"):
                raise ValueError(f"contexts: expected a prefix that ends in its only '{{}}', found {context!r}")
        return self

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))


class SolveOptions(BaseModel):
    """How sums become weights: `W_l = W0_l + rk_l (λ C_l + kk_l)⁻¹ / share_l`; `refresh` subtracts from rk_l what lower layers realise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lam: float = Field(gt=0)
    """λ: the weight of the preserved keys, as a pseudo-count of keys, since C is a mean."""
    spread: Spread
    """How L layers share the residual: `single` is for one layer; `even` asks each for 1/L of it; `refresh` asks each, bottom-up, for
    1/L, 1/(L−1), …, 1 of what those below leave; `d4s_code` for the same shares of all of it, as published: H_L times the residual."""
    moments: str
    """Digest of the stored second moments C."""

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))


class Measured(BaseModel):
    """One point of a calibration, on the edits it was measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...]
    site: Site
    lam: float
    spread: Spread
    fit: float
    """Median ρ."""
    efficacy: float
    generalization: float | None
    specificity: float | None
    score: float
    norm_ratio: float


class CalibrationNote(BaseModel):
    """How the values of a profile were found: the choice, what it was chosen over, and the trade-off along λ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: str
    """Digest of the whole report."""
    known: int
    """Facts that the base knew."""
    edits: int
    """Written in each trial."""
    chosen: Measured
    rivals: tuple[Measured, ...]
    curve: tuple[Measured, ...]
    """By λ."""
    growth: tuple[tuple[int, float], ...]
    """(edits, mean |W| / mean |W0| of the layer that grew most)."""


class Profile(BaseModel):
    """Everything D4S needs to know about one base. Stored under its digest, named by every manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    base: str
    """Digest of the base these values were chosen for."""
    prepare: PrepareOptions
    solve: SolveOptions
    origin: str = ""
    """Where the values come from, for people: measured, published, or written by hand."""
    max_norm_ratio: float | None = Field(default=None, gt=1)
    """mean |W| / mean |W0| of an edited layer at which people are alerted, where somebody knows what this base bears."""
    calibration: CalibrationNote | None = None
    """Where the values were measured."""

    @model_serializer(mode="wrap")
    def _omit_none(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Profiles from before there was a ratio, or a calibration, keep their bytes."""
        content: dict[str, Any] = spell(self)
        return {name: value for name, value in content.items() if value is not None or name not in ("max_norm_ratio", "calibration")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.solve.spread == "single" and len(self.prepare.layers) != 1:
            raise ValueError(f"spread: expected 'even' for {len(self.prepare.layers)} layers, found 'single'")
        return self

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        return digest_of(self.to_bytes())


class Retrofit(BaseModel):
    """How a neuron is trained after it was initialised, against the base alone (iReVa §4.2, `kv/kn_trainer.py`; algorithms.md §3.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(ge=0, lt=1)
    """The threshold it is trained under."""
    gain: float = Field(gt=0)
    steps: int = Field(default=5, ge=1)
    lr: float = Field(default=5e-2, gt=0)
    """AdamW's step size; betas .9 and .99, no weight decay (algorithms.md, resolution M)."""
    reconstruction: float = Field(default=1e-3, ge=0)
    """Weight of `mean((x·k − x·k⁰)²)`: the key goes on answering its own input as it did."""
    irrelevance: float = Field(default=1e-3, ge=0)
    """Weight of `mean(max(0, x_out·k − b))` over states of texts that the edit is not about."""


class NeuronOptions(BaseModel):
    """How an edit becomes neurons (iReVa §4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    """The layer beside whose MLP neurons answer. A late one: a value is a row of the unembedding, which layers above must leave alone."""
    max_target_tokens: int = Field(default=16, ge=1)
    """Longest target. Each of its tokens takes a neuron, and each of those has to fire."""
    retrofit: Retrofit | None = None
    """None: neurons stay as they are initialised, which the paper finds within one point of trained ones."""

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))


class GateOptions(BaseModel):
    """When neurons answer, and how loudly (design §5)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(default=0.75, ge=0, lt=1)
    """θ: the cosine with its key that an input must exceed for a neuron to fire. The published bias is θ·‖k⁰‖²."""
    gain: float = Field(default=80.0, gt=0)
    """How many times its value a neuron adds where the input is its key: `α = gain / ((1 − θ)(d − 1))`. Published: about 80."""
    gate: Literal["silent", "published"] = "silent"
    """Below the threshold exactly 0, or GELU as published, which is not silent there where d is small."""
    pooling: Literal["max", "sum"] = "max"
    """The neuron that fires most, or all that fire: an ablation of the paper."""

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))


class GatePoint(BaseModel):
    """What one setting of the gate does to the edits of a calibration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    theta: float
    gain: float
    efficacy: float
    generalization: float | None
    specificity: float | None
    score: float


class NeuronNote(BaseModel):
    """How the values of a neuron profile were found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: str
    """Digest of the whole report."""
    known: int
    """Facts that the base knew."""
    edits: int
    """Written in each trial."""
    chosen: GatePoint
    """On edits that the search did not write."""
    rivals: tuple[GatePoint, ...]
    """On the same edits: the published gate, and the best of other layers."""
    curve: tuple[GatePoint, ...]
    """By θ, at the chosen layer and gain, on the edits of the search."""
    gains: tuple[GatePoint, ...]
    """By gain, at the chosen layer and θ."""


class NeuronProfile(BaseModel):
    """Everything iReVa needs to know about one base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    editor: Literal["ireva"] = "ireva"
    base: str
    """Digest of the base these values were chosen for."""
    prepare: NeuronOptions
    solve: GateOptions
    origin: str = ""
    """As in `Profile`."""
    calibration: NeuronNote | None = None

    @property
    def max_norm_ratio(self) -> None:
        """Neurons leave every weight as it is."""
        return None

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        return digest_of(self.to_bytes())


AnyProfile = Profile | NeuronProfile
_READER: TypeAdapter[AnyProfile] = TypeAdapter(AnyProfile)


def parse_profile(data: bytes) -> AnyProfile:
    """A stored profile. Raises pydantic.ValidationError: none that this Errata reads."""
    return _READER.validate_json(data)


def name_editor(profile: AnyProfile) -> str:
    """The editor that a profile is for."""
    return profile.editor if isinstance(profile, NeuronProfile) else "d4s"


def require_same_pairs(own: AnyProfile, other: AnyProfile) -> None:
    """Raises InputError where pairs that were prepared under one profile are none under the other."""
    if name_editor(own) != name_editor(other):
        raise InputError(f"adopt: expected a profile for {name_editor(own)}, found one for {name_editor(other)}: another editor's pairs")
    if own.base != other.base:
        raise InputError(f"adopt: expected a profile of base {own.base[:12]}, found one of {other.base[:12]}; `errata rebase` goes there")
    ours, theirs = own.prepare.model_dump(mode="json"), other.prepare.model_dump(mode="json")
    if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise InputError(
            f"adopt: expected the prepare part that the stream's pairs were made with, found another ({', '.join(differing)}); "
            "`errata rebase --profile` prepares them anew"
        )
