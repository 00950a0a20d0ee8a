"""Settings of one installation: `errata.toml` in the working directory, overridden by `ERRATA_*` variables.

Nested values are spelled `ERRATA_GATE__MIN_EFFICACY`. Unknown keys are refused, so that a typo never passes silently.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from errata.distill_options import DistillOptions
from errata.errors import SettingsError
from errata.validation import explain_errors, explain_unknown

SETTINGS_FILE = "errata.toml"
PREFIX = "ERRATA_"
TEST_PREFIX = "ERRATA_TEST_"
"""Variables that steer the tests, not the program."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ApplySettings(_Section):
    batch_size: int = Field(default=100, ge=1)
    """Most edits in one batch, hence in one commit."""
    max_tries: int = Field(default=3, ge=1)
    """How often a run may fail over a file of the inbox until it is set aside."""
    snapshot_every: int = Field(default=10, ge=1)
    """Commits between two snapshots of the editor's state; in between, the pairs since the last one are replayed."""
    refresh_every: int = Field(default=5_000, ge=1)
    """Pairs added or removed until the sums are built anew from all live pairs, so that rounding does not pile up: see `errata compact`."""


class GateSettings(_Section):
    """Budgets the gate compares a candidate with. Proportions are in [0, 1]."""

    n_min: int = Field(default=5, ge=1)
    """A proportion over fewer prompts than this never decides alone."""
    max_rounds: int = Field(default=3, ge=1)
    """How often a batch is tried with fewer edits before it is rejected."""
    max_z_loss: float = Field(default=1.0, gt=0)
    """Of one edit: nats per token of target_new with its z in place on the base. Above it, z was not reached."""
    min_own_specificity: float = Field(default=0.5, ge=0, le=1)
    """Of one edit: agreement with the base on all its own neighbours."""
    min_efficacy: float = Field(default=0.5, ge=0, le=1)
    """Of the batch. An accepted edit always takes; where fewer than this share take, the batch is to blame and not each failing edit."""
    min_retention: float = Field(default=0.85, ge=0, le=1)
    """Of a sample of all live edits."""
    max_retention_drop: float = Field(default=0.1, ge=0, le=1)
    """Against the previous version."""
    min_specificity: float = Field(default=0.8, ge=0, le=1)
    """Agreement with the base on held-out neighbours of the batch."""
    max_locality_kl: float = Field(default=0.5, gt=0)
    """Mean KL(base ‖ candidate) in nats on the fixed probe."""
    max_norm_ratio: float = Field(default=10.0, gt=1)
    """mean |W| / mean |W0| of any edited layer."""


class EvaluateSettings(_Section):
    retention_sample: int = Field(default=100, ge=1)
    """Most live edits whose retention is measured per batch; bounded, so a batch's cost does not grow with history."""
    seed: int = 0
    """Seed of held-out probes and of the retention sample."""
    max_new_tokens: int = Field(default=12, ge=1)
    batch_tokens: int = Field(default=2_048, ge=64)
    """Padded tokens per forward pass. On a CPU larger batches leave the cache and get slower; on a GPU raise it."""


class KeepSettings(_Section):
    """Versions that keep their weights besides champion, challenger and pinned ones. The others keep all that their weights can be made
    from again."""

    recent: int = Field(default=20, ge=1)
    """So many of the newest."""
    daily_days: int = Field(default=30, ge=0)
    """The last one of each day (UTC), for so many days back from the newest commit."""


class GcSettings(_Section):
    grace_hours: float = Field(default=24.0, ge=1.0)
    """How long an object must have been of no use, by the storage's own clock, before it is deleted. Longer than any run takes."""


class WatchSettings(_Section):
    """What the watch measures, and the values at which people are alerted."""

    sample: int = Field(default=50, ge=1)
    """Most live edits of each age whose retention is measured."""
    ability_set: Path | None = None
    """JSONL of multiple-choice questions. None: the built-in world's own for the built-in base, else none."""
    norm_ratio: float | None = Field(default=None, gt=1)
    """mean |W| / mean |W0| of any edited layer. None: the profile's `max_norm_ratio`, else `gate.max_norm_ratio`."""
    min_retention: float = Field(default=0.85, ge=0, le=1)
    """Of the sampled edits of any age; a sample smaller than `gate.n_min` says nothing."""
    max_locality_kl: float = Field(default=0.5, gt=0)
    """Mean KL(base ‖ champion) in nats on the fixed probe."""
    stalled_hours: float = Field(default=24.0, gt=0)
    """Without a successful run, or without an accepted commit while edits wait that long."""
    cooldown_minutes: float = Field(default=360.0, ge=0)
    """A notification is not repeated for the same stream within this time."""


class MemorySettings(_Section):
    """What answers before it is written into the model: `errata remember`."""

    holds: Literal["pending", "all"] = "pending"
    """`pending`: live edits that are neither in the weights nor in the adapter. `all`: the others, too, so that memory answers first."""
    scope: Literal["guarded", "paper"] = "guarded"
    """`guarded`: a question that names a subject is answered from memory where it is also similar enough to the fact. `paper`: always."""
    floor: float | None = Field(default=None, ge=-1, le=1)
    """Least similarity under `guarded`. None: as measured for the default encoder."""
    demonstrations: int = Field(default=12, ge=0, le=64)
    """Most other facts that are shown before a question."""
    pool: Path | None = None
    """File of training edits that they are chosen from. None: the stream's own live edits."""
    encoder: str = "all-MiniLM-L6-v2"
    """Sentence encoder: that one comes from its package; else a folder, or a name of the Hugging Face hub."""


class ComputeSettings(_Section):
    """Where the work goes that can be cut into independent parts: second moments, and the targets of big batches."""

    runner: Literal["thread", "ray"] = "thread"
    """`thread`: this process, one part at a time, or one per GPU. `ray`: a Ray cluster, one GPU per part where it has any; needs the extra
    `ray`, and a root and a Prefect server that every machine of it reaches."""
    address: str | None = None
    """Of a running cluster, such as `auto` or `ray://host:10001`. None: the one that `RAY_ADDRESS` names, else one of this machine, for the
    length of the work."""


class MlflowSettings(_Section):
    tracking_uri: str | None = None
    """None: `MLFLOW_TRACKING_URI` where set, else a SQLite store inside a local root, else `mlflow.db` in the working directory."""


class PolicySettings(_Section):
    promote: Literal["auto", "manual"] = "auto"
    """`auto`: an accepted version becomes the champion at once. `manual`: it waits for `errata approve`; the next batch builds on it all
    the same."""
    max_risk: float | None = Field(default=None, ge=0)
    """In nats (`errata.edits.Risk.figure`). A batch that writes an edit of greater risk waits for approval, and what builds on it with it,
    whatever `promote` says. None: none does."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        toml_file=SETTINGS_FILE,
        nested_model_default_partial_update=True,
    )

    root: str = ".errata"
    """Folder or `s3://bucket/prefix` that holds streams."""
    stream: str = Field(default="main", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    device_map: Literal["auto"] | None = None
    """`auto`: a model that does not fit on the device is spread over it, main memory and the disk, by accelerate. None: all of it on the
    device."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads; None: torch's own choice. Content digests agree only between equal thread counts."""
    actor: str = Field(default_factory=lambda: os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown")
    cache: Path = Field(default_factory=lambda: platformdirs.user_cache_path("errata"))
    """Deletable: trained built-in bases, local indexes, Prefect's ephemeral database."""
    apply: ApplySettings = ApplySettings()
    gate: GateSettings = GateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    keep: KeepSettings = KeepSettings()
    gc: GcSettings = GcSettings()
    compute: ComputeSettings = ComputeSettings()
    distill: DistillOptions = DistillOptions()
    memory: MemorySettings = MemorySettings()
    mlflow: MlflowSettings = MlflowSettings()
    policy: PolicySettings = PolicySettings()
    watch: WatchSettings = WatchSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(**overrides: Any) -> Settings:
    """Read `errata.toml` and the environment; `overrides` that are None are ignored.

    Raises:
        SettingsError: an unknown key, an impossible value, or a file that is not TOML.
    """
    known = _spell_names(Settings)
    sections = {_spell_variable(name.partition(".")[0]) for name in known if "." in name}
    variables = {_spell_variable(name) for name in known} - sections
    for variable in os.environ:
        name = variable.upper()  # as pydantic-settings reads them
        if name in sections:
            example = min(other for other in variables if other.startswith(f"{name}__"))
            raise SettingsError(f"{variable}: expected a section's settings one by one, such as {example}, found the section")
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX) and name not in variables:
            raise SettingsError(explain_unknown(name, variables, "setting"))
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        present = {variable.upper() for variable in os.environ}
        problems = []
        for field, reason in explain_errors(error, known, "setting"):
            variable = _spell_variable(field or "")
            where = variable if variable in present else field if (field or "").partition(".")[0] in given else f"{SETTINGS_FILE}: {field}"
            problems.append(f"{where}: {reason}")
        raise SettingsError("; ".join(problems)) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{SETTINGS_FILE}: expected TOML in UTF-8, found a fault ({error})") from None


def spell_environment(settings: Settings) -> dict[str, str]:
    """The settings as variables for a process in another folder: every path is absolute; what is None is left to that process."""
    whole = settings.model_copy(update={"cache": settings.cache.absolute()})
    if settings.memory.pool is not None:
        whole = whole.model_copy(update={"memory": settings.memory.model_copy(update={"pool": settings.memory.pool.absolute()})})
    if settings.watch.ability_set is not None:
        whole = whole.model_copy(update={"watch": settings.watch.model_copy(update={"ability_set": settings.watch.ability_set.absolute()})})
    if "://" not in settings.root:
        whole = whole.model_copy(update={"root": str(Path(settings.root).absolute())})
    return dict(_spell_values(whole.model_dump(mode="json")))


def _spell_values(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _spell_values(value, f"{before}{name}.")
        elif value is not None:
            yield _spell_variable(before + name), json.dumps(value) if isinstance(value, list) else str(value)


def _spell_names(model: type[BaseModel], before: str = "") -> list[str]:
    """Every setting as `name` or `section.name`, and the sections themselves."""
    names = []
    for name, field in model.model_fields.items():
        names.append(before + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _spell_names(field.annotation, f"{before}{name}.")
    return names


def _spell_variable(name: str) -> str:
    return PREFIX + name.upper().replace(".", "__")
