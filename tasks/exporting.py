"""A commit as a model folder that anything loads."""

import tempfile
from pathlib import Path

from errata.candidates import load_artifacts
from errata.errors import InputError, StorageError
from errata.modeling.export import check_target, export_folder
from errata.settings import Settings
from registry.events import AcceptedCommit
from registry.packaging import export_model
from registry.stream import Stream
from tasks._session import load_under, read_manifest
from tasks.projecting import build_release


def export_pyfunc(settings: Settings, stream: Stream, seq: int, target: Path) -> Path:
    """Write the model that commit `seq` left as a folder that MLflow loads with nothing else: `mlflow.pyfunc.load_model(target)`.

    Raises:
        InputError: there is something at `target`, or nothing was ever accepted.
        StorageError: an object of the commit is missing or damaged, or the place cannot be written.
    """
    check_target(target)
    commit = stream.log.read(seq)
    if not isinstance(commit, AcceptedCommit):
        raise InputError(f"export: expected a commit with edits, found {seq}, which is the base itself")
    place = target.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as work:
            export_model(Path(work), build_release(settings, stream, commit, Path(work)), Path(work, "made"))
            check_target(target)
            Path(work, "made").rename(place)
    except OSError as error:
        raise StorageError(f"export: expected to write {place}: {error.strerror or error}") from error
    return place


def export_commit(settings: Settings, stream: Stream, seq: int, target: Path) -> Path:
    """Write the model that commit `seq` left as a Hugging Face folder.

    Raises:
        InputError: there is something at `target`.
        StorageError: an object of the commit is missing or damaged; `errata rebuild` makes artifacts again.
    """
    check_target(target)  # before a model is loaded for nothing
    commit = stream.log.read(seq)
    manifest = read_manifest(stream, commit.manifest or stream.head.manifest)
    artifacts = load_artifacts(stream.objects, manifest)
    model = load_under(settings, stream, manifest)
    note = {
        "stream": stream.name,
        "commit": seq,
        "recipe": manifest.recipe,
        "manifest": commit.manifest,
        "base": model.ref.named,
        "versions": commit.versions,
    }
    return export_folder(model.base, artifacts, target, note)
