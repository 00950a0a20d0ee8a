"""The built-in base: a small GPT-2-architecture model that Errata trains itself on the generated world, once, and caches.

Imports no torch; `errata.training` does the work when nothing is cached. A cached base is an ordinary Hugging Face folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from errata.edits import canonical_json, digest_of
from errata.placing import provide_folder
from errata.world import WorldSettings

CAVEAT = (
    "Measured on Errata's built-in base, a two-million-parameter model of a generated world: "
    "it tests the software and says nothing about large language models."
)
"""Shown wherever numbers of the built-in base are shown."""

REPORT_FILE = "train_report.json"

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done)."""


class TrainingSettings(BaseModel):
    """How a base is trained. Equal settings give equal digests.

    One device, of training only, makes the model keep a fact where large models do, so that an edit at the subject's last token can
    change its answers: a linear probe, thrown away afterwards, must read *all* attributes of a subject from the residual stream at the
    name's last token after block `site`. Left to itself, a model this small copies the name to the end of the prompt and looks the
    fact up there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: int = 1
    """Raised whenever the trainer's code changes what it produces, so that no older folder is taken for it."""
    family: Literal["gpt2", "llama"] = "gpt2"
    """`llama`: gated MLPs, rotary positions, no biases."""
    seed: int = 0
    width: int = 128
    layers: int = 5
    heads: int = 4
    inner: int = 1_024
    """Width of each MLP. Untouched facts suffer as edits fill it."""
    positions: int = 128
    """Longest text, in tokens."""
    site: int = 2
    """Block after which the probe reads a subject's attributes; edits belong at or below it."""
    steps: int = Field(default=430, ge=1)
    """Optimisation steps."""
    tokens: int = 1_500
    """Tokens per step, padding included."""
    muon_lr: float = 0.04
    """Muon's step size, for the matrices of the blocks."""
    adamw_lr: float = 0.01
    """AdamW's step size, for embeddings, norms, biases and the probe."""
    threads: int = Field(default=2, ge=1)
    """Torch threads. Part of the digest: other thread counts add up in another order."""
    passages: float = Field(default=0.0, ge=0, le=1)
    """Share of steps on in-context passages (`errata.passages`). With any, the tokenizer knows their words too."""
    retained: float = Field(default=0.0, ge=0, le=1)
    """Share of passages whose question the fact in front does not answer."""
    exchanged: float = Field(default=0.0, ge=0, le=1)
    """Share of facts whose subject's state at the probe's place is exchanged with that of another subject of the same relation, and the
    answers with it (interchange intervention training, Geiger et al., 2022, arXiv 2112.00826). Where names are told apart by single tokens
    and a subject has one attribute, answers are otherwise read past that place, and edits there do nothing."""

    @model_serializer(mode="wrap")
    def _omit_defaults(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Settings that say nothing of what came later keep their digests."""
        content: dict[str, Any] = spell(self)
        later = {"passages": 0.0, "retained": 0.0, "exchanged": 0.0, "family": "gpt2"}
        return {name: value for name, value in content.items() if name not in later or value != later[name]}

    @property
    def digest(self) -> str:
        """Names the cached folder."""
        return digest_of(canonical_json(self.model_dump(mode="json")))[:16]


class BuiltinSettings(TrainingSettings):
    """What a built-in base is made from. Equal settings name the same cached folder."""

    world: WorldSettings = WorldSettings()


BUILTIN = BuiltinSettings()
"""The base of `errata demo` and of the benchmarks: about a minute on two cores."""

CONTEXTUAL = BUILTIN.model_copy(update={"positions": 512, "steps": 1_050, "passages": 0.45, "retained": 0.3})
"""A sibling that also reads facts put before a question, up to twelve demonstrations with them: for what edits in context."""

NAMED = {"builtin": BUILTIN, "builtin-contextual": CONTEXTUAL}
"""What a user calls them."""

SMALL = BuiltinSettings(world=WorldSettings(persons=40), width=64, layers=4, inner=256, site=1, steps=120, tokens=800)
"""A sibling for unit tests: the same shape and tokenizer in seconds, but it knows little."""

SMALL_CONTEXTUAL = SMALL.model_copy(
    update={"world": WorldSettings(persons=20), "positions": 512, "steps": 320, "passages": 0.5, "threads": 1}
)
"""The contextual base's own, for unit tests: knows its twenty persons, and often reads."""


def ensure_builtin(settings: BuiltinSettings, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the folder of the trained base, training it first if the cache has none.

    The folder appears under its name only when it is whole: it is written beside it and renamed, so an interrupted training leaves
    nothing that could be taken for a base, and of two processes that train at once the first to finish provides it.

    Args:
        settings: what to train.
        cache_dir: the cache's root; the base goes to `builtin/<digest>/` below it.
        progress: called after each step.

    Returns:
        A folder for `transformers.AutoModelForCausalLM.from_pretrained`; `train_report.json` in it holds settings, accuracy and cost.
    """

    def train(draft: Path) -> None:
        from errata.training import train_builtin  # torch and transformers take seconds to import

        report = train_builtin(settings, draft, progress)
        (draft / REPORT_FILE).write_text(json.dumps({"settings": settings.model_dump(mode="json"), **report}, indent=1) + "\n")

    return provide_folder(cache_dir / "builtin" / settings.digest, train)
