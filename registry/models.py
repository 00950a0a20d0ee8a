"""MLflow as a projection of the commit log: one run and one model version per promoted commit, and the alias `champion` (design §4, §8).

The log is the truth. Everything here can be made again from it: `project` finds what an earlier, interrupted call has left behind and
goes on from there. MLflow has no compare-and-swap, so who moves the alias reads the head of the log again afterwards.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from errata.edits import digest_of
from errata.errors import RegistryError, UnknownNameError
from registry.packaging import build_model
from registry.release import Release, Version, name_part, name_weights, tag_release
from registry.runs import Runs

# isort: split
# After `packaging`, which sets what MLflow reads while it is imported.
from mlflow import artifacts, pyfunc, set_tracking_uri
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Param, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

CHAMPION = "champion"
CHALLENGER = "challenger"
"""The version that waits for `errata approve`."""
_PLOT = "norms.png"
_PARTS = "parts"
_PARTS_TAG = "errata.parts"

_PAGE = 10_000
_LOOKED_AT = 20
"""Newest versions among which one of ours is expected; others are half registered, or somebody else's."""

_Found = TypeVar("_Found")


class ModelRegistry(Runs):
    """The runs and model versions of all streams in one MLflow."""

    def project(self, release: Release) -> Version:
        """The version that shows a commit: found, or made. Safe to repeat, and to run in two places at once.

        Raises:
            RegistryError: MLflow fails, or shows this commit number with another manifest.
        """
        with self.reporting(f"show commit {release.commit} of {release.stream}"):
            found = self._find_tagged(release.stream, release.commit)
            if found is None or "errata.manifest" not in found.tags:
                run = self.claim_run(f"errata/streams/{release.stream}", f"commit {release.commit}", "errata.commit", tag_release(release))
                model = self._find_model(run) or self._log_model(run, release)
                if run.info.status != "FINISHED":
                    self._fill_run(run, release)
                found = self._register(run, model, release)
        if found.tags["errata.manifest"] != release.manifest:
            raise RegistryError(
                f"MLflow at {self.tracking_uri}: expected commit {release.commit} of {release.stream} with manifest "
                f"{release.manifest[:12]}, found {found.uri} with {found.tags['errata.manifest'][:12]}: "
                "a stream of this name from another root is registered here; use another stream name or another tracking URI"
            )
        return found

    def find_version(self, stream: str, commit: int) -> Version | None:
        """The version that shows a commit, if there is one."""
        with self.reporting(f"look for commit {commit} of {stream}"):
            return self._find_tagged(stream, commit)

    def read_version(self, stream: str, number: int) -> Version:
        """
        Raises:
            UnknownNameError: no such version, or one that Errata did not make.
        """
        with self.reporting(f"read version {number} of {stream}"):
            found = _describe(self._look_up(lambda: self.client.get_model_version(stream, str(number))))
        if found is None:
            raise UnknownNameError(f"v{number}: expected a version of {stream!r} that shows a commit, found none")
        return found

    def list_versions(self, stream: str, most: int | None = None) -> list[Version]:
        """All versions that show a commit, newest first; with `most`, about so many of the newest."""
        versions: list[Version] = []
        with self.reporting(f"list the versions of {stream}"):
            token = None
            while True:
                query, size = f"name = '{stream}'", most or _PAGE
                page = self.client.search_model_versions(query, size, order_by=["version_number DESC"], page_token=token)
                versions += filter(None, map(_describe, page))
                token = page.token
                if not token or (most and len(versions) >= most):
                    return versions

    def find_newest(self, stream: str) -> Version | None:
        """The newest version that shows a commit, if there is one."""
        with self.reporting(f"look for the newest version of {stream}"):
            page = self.client.search_model_versions(f"name = '{stream}'", max_results=_LOOKED_AT, order_by=["version_number DESC"])
            return next(filter(None, map(_describe, page)), None)

    def champion(self, stream: str) -> Version | None:
        """What `models:/<stream>@champion` loads, if anything."""
        return self.find_alias(stream, CHAMPION)

    def find_alias(self, stream: str, alias: str) -> Version | None:
        """What `models:/<stream>@<alias>` loads, if anything."""
        with self.reporting(f"read {stream}@{alias}"):
            return _describe(self._look_up(lambda: self.client.get_model_version_by_alias(stream, alias)))

    def point_alias(self, version: Version, alias: str = CHAMPION) -> None:
        """Make a version the one that an alias names.

        Raises:
            RegistryError: MLflow fails, or the alias read back is not what was set.
        """
        with self.reporting(f"point {version.stream}@{alias} at version {version.number}"):
            self.client.set_registered_model_alias(version.stream, alias, str(version.number))
        found = self.find_alias(version.stream, alias)
        if found is None or found.number != version.number:
            raise RegistryError(
                f"MLflow at {self.tracking_uri}: expected {version.stream}@{alias} at version {version.number} "
                f"after setting it, found {found.number if found else 'none'}: someone else moved it"
            )

    def remove_alias(self, stream: str, alias: str) -> None:
        """Make an alias name nothing."""
        with self.reporting(f"remove {stream}@{alias}"):
            self.client.delete_registered_model_alias(stream, alias)

    def read_part(self, stream: str, digest: str) -> bytes:
        """A part of the artifacts of a stream's versions, as MLflow has it.

        Raises:
            RegistryError: it cannot be read, or is not what was stored.
        """
        with self.reporting(f"read part {digest[:12]} of {stream}"), tempfile.TemporaryDirectory() as temporary:
            run = self._find_parts(stream)
            if run is None:
                raise RegistryError(f"MLflow at {self.tracking_uri}: expected the run with the parts of {stream}, found none")
            where = {"run_id": run.info.run_id, "artifact_path": f"{_PARTS}/{name_part(digest)}", "tracking_uri": self.tracking_uri}
            data = Path(artifacts.download_artifacts(dst_path=temporary, **where)).read_bytes()
        if (found := digest_of(data)) != digest:
            raise RegistryError(f"part of {stream}: expected bytes with sha256 {digest}, read back some with {found}")
        return data

    def remove_parts(self, stream: str, digests: Iterable[str]) -> None:
        """Remove parts that hold something erased, where they are there. Safe to repeat."""
        with self.reporting(f"remove what was erased from the parts of {stream}"):
            run = self._find_parts(stream)
            if run is None:
                return
            store = get_artifact_repository(run.info.artifact_uri)
            there = {item.path for item in self.client.list_artifacts(run.info.run_id, _PARTS)}
            for path in sorted({f"{_PARTS}/{name_part(digest)}" for digest in digests} & there):
                store.delete_artifacts(path)  # type: ignore[no-untyped-call]

    def read_artifacts(self, version: Version) -> list[bytes]:
        """The artifacts of a version as MLflow has them, in order of application.

        Raises:
            RegistryError: they cannot be read, or are not the bytes that were registered.
        """
        with self.reporting(f"read the artifacts of {version.uri}"), tempfile.TemporaryDirectory() as temporary:
            source = self.client.get_model_version_download_uri(version.stream, str(version.number))
            folder = Path(artifacts.download_artifacts(f"{source}/artifacts/version", dst_path=temporary, tracking_uri=self.tracking_uri))
            layers = json.loads((folder / "version.json").read_text())["layers"]
            read = [(layer["digest"], (folder / layer["file"]).read_bytes()) for layer in layers]
        for expected, data in read:
            if (found := digest_of(data)) != expected:
                raise RegistryError(f"{version.uri}: expected an artifact with sha256 {expected}, read back one with {found}")
        return [data for _, data in read]

    def load_champion(self, stream: str) -> Any:
        """`models:/<stream>@champion`, as any consumer loads it.

        Raises:
            RegistryError: there is none, or it cannot be loaded.
        """
        with self.reporting(f"load {stream}@{CHAMPION}"):
            set_tracking_uri(self.tracking_uri)
            return pyfunc.load_model(f"models:/{stream}@{CHAMPION}")

    def save_plot(self, version: Version, folder: Path) -> Path:
        """Copy a version's plot of weight norms to `folder`; the path of the copy.

        Raises:
            RegistryError: the version has none.
        """
        with self.reporting(f"read the norm plot of {version.uri}"):
            folder.mkdir(parents=True, exist_ok=True)
            found = artifacts.download_artifacts(
                run_id=version.run, artifact_path=_PLOT, dst_path=str(folder), tracking_uri=self.tracking_uri
            )
        return Path(found)

    def log_watch(self, version: Version, metrics: Mapping[str, float], moment: int, step: int, files: Sequence[Path]) -> None:
        """Add what the watch measured to a version's run: `metrics` at `moment` (milliseconds), `files` in the folder `watch`, where they
        replace those of the watch before."""
        self.log_metrics(version, "watch", metrics, moment, step)
        with self.reporting(f"show the watch of {version.uri}"):
            for path in files:
                self.client.log_artifact(version.run, str(path), "watch")

    def log_metrics(self, version: Version, what: str, metrics: Mapping[str, float], moment: int, step: int) -> None:
        """Add what was measured after a version was made to its run, as `<what>.<name>`, at `moment` (milliseconds)."""
        with self.reporting(f"log {what} of {version.uri}"):
            self.client.log_batch(version.run, [Metric(f"{what}.{name}", value, moment, step) for name, value in metrics.items()])

    def hide_version(self, version: Version, erasure: int, *, weights: bool, report: bytes | None) -> None:
        """Remove what a version holds of edits that commit `erasure` erased. Safe to repeat.

        Args:
            weights: the version's weights carry them; it cannot be loaded any more.
            report: the report as it reads now.
        """
        with self.reporting(f"remove what was erased from {version.uri}"):
            if report is not None:
                # Deleted first: stores that do not overwrite would keep the old one.
                get_artifact_repository(self.client.get_run(version.run).info.artifact_uri).delete_artifacts("report.json")  # type: ignore[no-untyped-call]
                self.client.log_text(version.run, report.decode(), "report.json")
            if weights:
                self._remove_weights(version)
            self.client.set_model_version_tag(version.stream, str(version.number), "errata.erased", str(erasure))

    def archive_version(self, version: Version, told: str) -> None:
        """Remove a version's weights and say in its tag `errata.archived` how to get them back. Safe to repeat."""
        with self.reporting(f"archive {version.uri}"):
            self.client.set_model_version_tag(version.stream, str(version.number), "errata.archived", told)
            self._remove_weights(version)

    def restore_version(self, version: Version, weights: Sequence[bytes], parts: Sequence[str], read_part: Callable[[str], bytes]) -> None:
        """Give an archived version its weights again, in order of application, and their parts. Safe to repeat."""
        with self.reporting(f"restore {version.uri}"), tempfile.TemporaryDirectory() as temporary:
            if parts:
                self._add_parts(self._claim_parts(version.stream), parts, read_part)
            store = self._open_weights(version)
            for name, data in name_weights(weights):
                Path(temporary, name).write_bytes(data)
                store.log_artifact(str(Path(temporary, name)))  # type: ignore[no-untyped-call]
            if "errata.archived" in version.tags:
                self.client.delete_model_version_tag(version.stream, str(version.number), "errata.archived")

    def _remove_weights(self, version: Version) -> None:
        store = self._open_weights(version)
        for item in store.list_artifacts():
            if item.path.endswith(".safetensors"):
                store.delete_artifacts(item.path)  # type: ignore[no-untyped-call]

    def _open_weights(self, version: Version) -> ArtifactRepository:
        """Where the weights of a version lie."""
        source = self.client.get_model_version_download_uri(version.stream, str(version.number))
        return get_artifact_repository(f"{source}/artifacts/version")

    def _find_tagged(self, stream: str, commit: int) -> Version | None:
        # The oldest counts: a second one can only come from a racing projector, which removes its own again.
        page = self.client.search_model_versions(
            f"name = '{stream}' and tag.`errata.commit` = '{commit}'", max_results=1, order_by=["version_number ASC"]
        )
        return _describe(page[0]) if page else None

    def _find_model(self, run: Run) -> LoggedModel | None:
        """The model that an earlier call has uploaded whole."""
        models = self.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        return next((model for model in models if model.status == "READY"), None)

    def _log_model(self, run: Run, release: Release) -> LoggedModel:
        reference, parts = self._refer_to_base(release), self._refer_to_parts(release)
        tags = {"errata.commit": str(release.commit)}
        model = self.client.create_logged_model(run.info.experiment_id, f"commit-{release.commit}", run.info.run_id, tags)
        with tempfile.TemporaryDirectory() as temporary:
            folder = build_model(Path(temporary), release, reference, parts, run.info.run_id, model.model_id)
            self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=release.commit)])
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _refer_to_base(self, release: Release) -> dict[str, str | None]:
        """How a version names its base: the hub id at a pinned revision, or the one run that holds the files."""
        ref = release.base
        if ref.kind == "hub":
            return {"kind": "hub", "digest": ref.digest, "source": ref.source, "revision": ref.revision}
        note = "Every model version on this base reads these files. Do not delete this run."
        tags = {"errata.base": ref.digest, "mlflow.note.content": note}
        run = self.claim_run("errata/bases", f"errata base {ref.digest[:12]}", "errata.base", tags)
        if run.info.status != "FINISHED":
            if release.base_folder is None:
                raise RegistryError(f"base {ref.digest[:12]}: expected the folder with its files for its first version, found none")
            for name in ref.files:
                self.client.log_artifact(run.info.run_id, str(release.base_folder / name), "base")
            self.client.set_terminated(run.info.run_id)
        return {"kind": ref.kind, "digest": ref.digest, "uri": f"runs:/{run.info.run_id}/base"}

    def _refer_to_parts(self, release: Release) -> str | None:
        """Where the parts of a version's artifacts are: in one run of the stream, each once, whatever the number of versions."""
        wanted = dict.fromkeys(digest for own in release.parts for digest in own)
        if not wanted:
            return None
        run = self._claim_parts(release.stream)
        self._add_parts(run, wanted, release.read_part)
        return f"runs:/{run.info.run_id}/{_PARTS}"

    def _claim_parts(self, stream: str) -> Run:
        note = "Every model version of this stream reads these files. Do not delete this run."
        tags = {_PARTS_TAG: stream, "mlflow.note.content": note}
        return self.claim_run(f"errata/streams/{stream}", "parts", _PARTS_TAG, tags)

    def _find_parts(self, stream: str) -> Run | None:
        return self.find_run(f"errata/streams/{stream}", _PARTS_TAG, stream)

    def _add_parts(self, run: Run, wanted: Iterable[str], read: Callable[[str], bytes]) -> None:
        there = {item.path.rpartition("/")[2] for item in self.client.list_artifacts(run.info.run_id, _PARTS)}
        with tempfile.TemporaryDirectory() as temporary:
            for digest in wanted:
                if name_part(digest) not in there:
                    path = Path(temporary, name_part(digest))
                    path.write_bytes(read(digest))
                    self.client.log_artifact(run.info.run_id, str(path), _PARTS)
                    path.unlink()
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id)

    def _fill_run(self, run: Run, release: Release) -> None:
        """Log everything else of a commit. Repeating it changes nothing; the run is finished once it is all there."""
        identifier = run.info.run_id
        moment = int(release.time.timestamp() * 1000)
        metrics = [Metric(key, value, moment, release.commit) for key, value in release.metrics.items()]
        params = [Param(key, str(value)) for key, value in release.parameters.items()]
        try:
            self.client.log_batch(identifier, metrics, params)
        except MlflowException:
            # Of two that log the same at once, MLflow fails one, which finds it there when it tries again.
            self.client.log_batch(identifier, metrics, params)
        with tempfile.TemporaryDirectory() as temporary:
            if release.report is not None:
                path = Path(temporary, "report.json")
                path.write_bytes(release.report)
                self.client.log_artifact(identifier, str(path))
            if release.plot is not None:
                path = Path(temporary, _PLOT)
                shutil.copyfile(release.plot, path)
                self.client.log_artifact(identifier, str(path))
        self.client.set_terminated(identifier)

    def _register(self, run: Run, model: LoggedModel, release: Release) -> Version:
        stream, tags = release.stream, tag_release(release)
        untagged = self.client.search_model_versions(f"name = '{stream}' and run_id = '{run.info.run_id}'", max_results=1)
        if untagged:
            # Backwards, so that the commit, by which versions are found, comes last.
            for key, value in reversed(tags.items()):
                self.client.set_model_version_tag(stream, untagged[0].version, key, value)
            return Version(stream, int(untagged[0].version), release.commit, run.info.run_id, tags)
        if self._look_up(lambda: self.client.get_registered_model(stream)) is None:
            try:
                self.client.create_registered_model(stream, description=f"Errata's stream {stream}: each version shows one commit.")
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another process, since we looked
                    raise
        # By location and not as models:/<id>, which MLflow's SQL store looks up in the process's global tracking URI instead of ours.
        created = self.client.create_model_version(stream, model.artifact_location, run.info.run_id, tags, model_id=model.model_id)
        first = self._find_tagged(stream, release.commit)
        if first is not None and first.number != int(created.version):
            self.client.delete_model_version(stream, created.version)
            return first
        return Version(stream, int(created.version), release.commit, run.info.run_id, tags)

    def _look_up(self, read: Callable[[], _Found]) -> _Found | None:
        try:
            return read()
        except MlflowException as error:
            # The alias of a model that exists but has no such alias is answered with INVALID_PARAMETER_VALUE.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _describe(version: ModelVersion | None) -> Version | None:
    if version is None or not version.tags.get("errata.commit", "").isdigit():
        return None
    tags = {key: value for key, value in version.tags.items() if key.startswith("errata.")}
    return Version(version.name, int(version.version), int(tags["errata.commit"]), version.run_id or "", tags)
