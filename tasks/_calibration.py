"""What the stages of every calibration share: where it works, and how it ends."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from errata.editors.base import Progress
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.profiles import AnyProfile, name_editor
from errata.settings import Settings, load_settings
from registry.calibrations import store_found
from registry.release import resolve_tracking
from registry.shared import put_profile
from registry.storage.base import Storage, open_storage
from registry.trials import TrialRuns
from tasks._progress import show_progress
from tasks._session import find_stored

T = TypeVar("T")

MOST_EDITS = 150
"""Of a trial."""
_FEWEST = 24
_TIMED = 4


class Kept(NamedTuple):
    """What a calibration leaves behind."""

    profile: str
    """Digest."""
    figures: tuple[str, ...]
    """Where they lie."""
    run: str
    """MLflow's id of the search."""


def open_root() -> tuple[Settings, Storage]:
    settings = load_settings()
    return settings, open_storage(settings.root)


def load_base(settings: Settings, storage: Storage, base: str) -> Base:
    return find_stored(settings, storage, base, settings.device)[2]


def open_runs(settings: Settings, base: str, search: str) -> TrialRuns:
    return TrialRuns(*resolve_tracking(settings.mlflow.tracking_uri, settings.root), base, search)


def afford_edits(try_some: Callable[[int], object], most: int, seconds: float) -> int:
    """How many edits one step may write in so many seconds: doubled as long as the double is likely to do.

    Args:
        try_some: takes a step with so many edits.
    """
    count = min(_FEWEST, most)
    try_some(min(_TIMED, most))  # pays for what is made once
    while count < most:
        begun = time.perf_counter()
        try_some(count)
        if 2 * (time.perf_counter() - begun) > seconds:
            break
        count = min(2 * count, most)
    return count


class Measured(NamedTuple, Generic[T]):
    """What a step of a search gave."""

    trials: tuple[T, ...]
    fault: str | None
    """Why nothing could be written, where nothing could."""
    seconds: float


def measure_step(told: str, try_all: Callable[[Progress], Iterable[T]]) -> Measured[T]:
    """Take a step of a search, under a bar that says `told`. What cannot be solved is a finding."""
    begun = time.perf_counter()
    trials, fault = tuple[T, ...](), None
    with show_progress(told) as on_progress:
        try:
            trials = tuple(try_all(on_progress))
        except EditorError as error:
            fault = str(error)
    return Measured(trials, fault, round(time.perf_counter() - begun, 3))


def list_metrics(values: Mapping[str, float | None]) -> dict[str, float]:
    """What was measured of a trial, for MLflow."""
    return {name: float(value) for name, value in values.items() if value is not None}


def keep_choice(
    settings: Settings,
    storage: Storage,
    search: str,
    profile: AnyProfile,
    report: str,
    figures: Mapping[str, bytes],
    parameters: Mapping[str, object],
    metrics: Mapping[str, float],
) -> Kept:
    """Store the profile that a search ended with, where a new stream finds it, and show it in MLflow.

    Args:
        search, report: digests.
        figures: name → PNG.
        parameters, metrics: of the choice, for MLflow.
    """
    digest = put_profile(storage, profile.base, profile.to_bytes())
    places = store_found(storage, profile.base, name_editor(profile), datetime.now(UTC), digest, report, dict(figures))
    runs = open_runs(settings, profile.base, search)
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, f"{name}.png") for name in figures] + [Path(temporary, "profile.json")]
        for path, data in zip(files, (*figures.values(), profile.to_bytes()), strict=True):
            path.write_bytes(data)
        runs.conclude({"profile": digest, **parameters}, {f"validation.{name}": value for name, value in metrics.items()}, files)
    return Kept(digest, tuple(places), runs.run_id)
