"""Commits as MLflow versions: whatever the log has accepted and MLflow does not show yet, then the alias (design §4)."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errata.editors.artifacts import Fetch
from errata.editors.kinds import load_artifact
from errata.errors import ErasedError, RegistryError
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.tokens import encode_prompt
from errata.monitors.locality import PROBE_TEXTS
from errata.monitors.norms import NormPoint, plot_norms
from errata.report import Report
from errata.settings import Settings
from registry.events import AcceptedCommit
from registry.keeping import open_archived
from registry.marks import mark_shown
from registry.models import CHALLENGER, CHAMPION, ModelRegistry
from registry.release import Release, Version, resolve_tracking
from registry.stream import Stream
from registry.tiers import MEMORY
from registry.verification import verify_logits
from tasks._session import load_under, open_named, read_manifest
from tasks._task import stage
from tasks.announcing import announce_champion

_PLOTTED = 50
"""Most commits in the plot of a version: what a version costs may not grow with history."""
_PROMPTS = 4
"""Prompts whose logits are compared before the alias moves."""
_LONGEST = 250
"""Characters of a reason in MLflow's parameters."""


@stage
def project_versions(stream: str) -> int | None:
    """See `show_log`; the number of the champion's version."""
    return show_log(*open_named(stream))[0]


def show_log(settings: Settings, stream: Stream, *, everything: bool = False) -> tuple[int | None, int]:
    """Make MLflow show the log: a version per accepted commit, the alias on the champion's. Safe to repeat.

    Args:
        everything: look for missing versions in the whole log, not only after the newest version.

    Returns:
        Number of the champion's version, None while there is no champion; and how many versions were made.

    Raises:
        RegistryError: MLflow fails, or what is read back from it is not what was accepted.
    """
    if stream.head.accepted == 0:
        return None, 0
    registry, made = open_registry(settings), 0
    while True:
        champion, challenger = stream.head.champion, stream.head.challenger
        for commit in find_unshown(stream, registry, everything):
            with tempfile.TemporaryDirectory(prefix="errata-") as work:
                try:
                    release = build_release(settings, stream, commit, Path(work))
                except ErasedError:
                    continue  # it has no weights any more
                registry.project(release)
            made += 1
        served = show_alias(settings, stream, registry, CHAMPION, champion or None)
        show_alias(settings, stream, registry, CHALLENGER, challenger)
        if served is not None:
            mark_shown(stream, champion)
        # MLflow has no compare-and-swap: whoever committed meanwhile must not find an older champion behind theirs.
        head = stream.refresh()
        if (head.champion, head.challenger) == (champion, challenger):
            return served, made


def show_alias(settings: Settings, stream: Stream, registry: ModelRegistry, alias: str, commit: int | None) -> int | None:
    """Make an alias name the version of a commit, or nothing; the number of that version."""
    shown = registry.find_alias(stream.name, alias)
    if commit is None:
        if shown is not None:
            registry.remove_alias(stream.name, alias)
        return None
    version = registry.find_version(stream.name, commit)
    if version is None:
        raise RegistryError(
            f"MLflow at {registry.tracking_uri}: expected a version of {stream.name!r} for commit {commit}, found none; "
            "was it deleted? `errata repair` makes it again"
        )
    if shown is None or shown.number != version.number:
        verify_version(settings, stream, registry, version)
        registry.point_alias(version, alias)
        if alias == CHAMPION:
            announce_champion(settings, stream, version.number, shown.number if shown else None)
    return version.number


def open_registry(settings: Settings) -> ModelRegistry:
    return ModelRegistry(*resolve_tracking(settings.mlflow.tracking_uri, settings.root))


def find_unshown(stream: Stream, registry: ModelRegistry, everything: bool) -> list[AcceptedCommit]:
    """Accepted commits without a version, oldest first: those after the newest version, or with `everything` wherever they are."""
    if everything:
        shown = {version.commit for version in registry.list_versions(stream.name)}
        candidates = [seq for seq in range(1, stream.head.seq + 1) if seq not in shown]
    else:
        newest = registry.find_newest(stream.name)
        candidates = list(range(newest.commit + 1 if newest else 1, stream.head.seq + 1))
    archived = open_archived(stream.storage, stream.name).read() if everything else {}
    commits = [stream.log.read(seq) for seq in candidates if seq not in archived]
    return [commit for commit in commits if isinstance(commit, AcceptedCommit)]


def build_release(settings: Settings, stream: Stream, commit: AcceptedCommit, work: Path) -> Release:
    """All that MLflow shows of a commit; its plot is drawn into the folder `work`."""
    manifest = read_manifest(stream, commit.manifest)
    model = load_under(settings, stream, manifest)
    data = stream.objects.get(commit.report) if commit.report else None
    prepare, solve = model.profile.prepare, model.profile.solve
    parameters: dict[str, Any] = {"editor": model.editor.name, "editor_version": model.editor.version, "profile": manifest.profile[:12]}
    parameters |= {f"prepare.{name}": _shorten(value) for name, value in prepare.model_dump(mode="json").items()}
    parameters |= {f"solve.{name}": _shorten(value) for name, value in solve.model_dump(mode="json").items()}
    report = Report.from_bytes(data) if data else None
    metrics = report.metrics() if report else {}
    # Of this commit, not of the head: a version that is made later, or again, says the same.
    counts = {f"batch_{name}": number for name, number in Counter(row.told for row in stream.read_outcomes(commit)).items()}
    if report and report.live is not None:
        counts["edits_live"] = report.live
    return Release(
        stream=stream.name,
        commit=commit.seq,
        time=commit.time,
        recipe=manifest.recipe,
        manifest=commit.manifest,
        base=model.ref,
        base_folder=model.folder,
        artifacts=[stream.objects.get(digest) for digest in manifest.artifacts],
        parts=[layer.parts for layer in manifest.layers if layer.artifact],
        read_part=stream.objects.get,
        remembers=manifest.find_above(MEMORY) is not None,
        counts=counts,
        parameters=parameters,
        metrics=metrics | {f"seconds.{name}": value for name, value in commit.seconds.items()},
        report=data,
        plot=plot_history(stream, commit.seq, work),
    )


def plot_history(stream: Stream, seq: int, work: Path) -> Path | None:
    """Weight norms over the last accepted commits up to `seq`, as a PNG in `work`; None where nothing was measured."""
    points = []
    for earlier in range(seq, 0, -1):
        commit = stream.log.read(earlier)
        if isinstance(commit, AcceptedCommit) and commit.report:
            report = Report.from_bytes(stream.objects.get(commit.report))
            points.append(NormPoint(commit=commit.seq, live=report.live or 0, norms=report.norms))
        if len(points) == _PLOTTED:
            break
    return plot_norms(points, work / "weight_norms.png") if any(point.norms for point in points) else None


def verify_version(settings: Settings, stream: Stream, registry: ModelRegistry, version: Version) -> None:
    """Compare what MLflow holds with what was accepted, by the logits both give on the base in memory."""
    manifest = read_manifest(stream, stream.log.read(version.commit).manifest or "")
    base = load_under(settings, stream, manifest).base
    accepted = [stream.objects.get(digest) for digest in manifest.artifacts]
    verify_logits(registry, version, _answer(base, accepted, stream.objects.get), partial(_answer, base))


@torch.inference_mode()
def _answer(base: Base, artifacts: Sequence[bytes], fetch: Fetch) -> np.ndarray[Any, Any]:
    """Logits [prompts, vocab] after a few fixed texts."""
    with attach(base, [load_artifact(data, fetch) for data in artifacts]):
        logits = []
        for text in PROBE_TEXTS[:_PROMPTS]:
            ids = torch.tensor([encode_prompt(base.tokenizer, text)], device=base.device)
            logits.append(base.model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu())
    return torch.stack(logits).numpy()


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
