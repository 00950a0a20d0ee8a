"""Runs of MLflow: claimed by a tag, so that what is repeated finds its own. What versions and trials share."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from errata.errors import ErrataError, RegistryError

# isort: split
import registry.packaging  # noqa: F401  sets what MLflow reads while it is imported

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException


class Runs:
    """The runs in one MLflow.

    Args:
        tracking_uri, artifact_root: see `resolve_tracking`.
    """

    def __init__(self, tracking_uri: str, artifact_root: str | None = None) -> None:
        self.tracking_uri = tracking_uri
        self._artifact_root = artifact_root
        # MLflow's own seven retries keep a user waiting for minutes when the server is down; a projection can be repeated at any time.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # it reports every table it makes and version it waits for
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        with self.reporting("connect"):
            self.client = MlflowClient(tracking_uri, registry_uri=tracking_uri)

    def claim_run(self, experiment: str, name: str, key: str, tags: Mapping[str, str]) -> Run:
        """The run whose tag `key` is as in `tags`, begun if there is none. Of two begun at once, both callers take the older."""
        experiment_id = self._ensure_experiment(experiment)
        found = self._find_run(experiment_id, key, tags[key])
        if found is not None:
            return found
        # All tags at once: MLflow fails where two processes set one tag of one run at the same time.
        mine: Run = self.client.create_run(experiment_id, run_name=name, tags=dict(tags))
        chosen = self._find_run(experiment_id, key, tags[key]) or mine
        if chosen.info.run_id != mine.info.run_id:
            self.client.delete_run(mine.info.run_id)
        return chosen

    def find_run(self, experiment: str, key: str, value: str) -> Run | None:
        """The run of an experiment that has a tag, if there is one; nothing is made."""
        found = self.client.get_experiment_by_name(experiment)
        return self._find_run(found.experiment_id, key, value) if found is not None else None

    def _find_run(self, experiment_id: str, key: str, value: str) -> Run | None:
        runs = self.client.search_runs(
            [experiment_id], f"tags.`{key}` = '{value}'", ViewType.ACTIVE_ONLY, max_results=1, order_by=["attributes.start_time ASC"]
        )
        return runs[0] if runs else None

    def _ensure_experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = f"{self._artifact_root}/{name}" if self._artifact_root else None
            try:
                created: str = self.client.create_experiment(name, artifact_location=location)
                return created
            except MlflowException as error:
                found = self.client.get_experiment_by_name(name)  # another process made it first
                if found is None:
                    raise error
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        identifier: str = found.experiment_id
        return identifier

    @contextmanager
    def reporting(self, action: str) -> Iterator[None]:
        try:
            yield
        except ErrataError:
            raise
        except Exception as error:  # MLflow passes on what its databases, servers and artifact stores raise
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise RegistryError(f"MLflow at {self.tracking_uri}: expected to {action}, but: {reason}") from error
