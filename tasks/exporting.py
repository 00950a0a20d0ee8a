"""A commit as a model folder that anything loads."""

from pathlib import Path

from errata.candidates import load_artifacts
from errata.modeling.export import check_target, export_folder
from errata.settings import Settings
from registry.stream import Stream
from tasks._session import load_under, read_manifest


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
