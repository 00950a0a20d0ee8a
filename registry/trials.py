"""Calibrations and comparisons in MLflow: one run per search, and under it one run per trial. A projection: whatever is repeated finds its
own runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.runs import Runs

# isort: split
from mlflow.entities import Metric, Param

_FINISHED = "FINISHED"


class TrialRuns(Runs):
    """The runs of one search.

    Args:
        base, search: digests.
        shelf: what they are, in the name of the experiment.
    """

    def __init__(self, tracking_uri: str, artifact_root: str | None, base: str, search: str, shelf: str = "calibrations") -> None:
        super().__init__(tracking_uri, artifact_root)
        self._experiment = f"errata/{shelf}/{base[:12]}"
        self._search = search
        with self.reporting(f"begin the search {search[:12]}"):
            tags = {"errata.base": base, "errata.search": search}
            self.run_id: str = self.claim_run(self._experiment, f"search {search[:12]}", "errata.search", tags).info.run_id

    def record_trial(
        self,
        name: str,
        trial: str,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        course: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Show one trial. Repeating it changes nothing.

        Args:
            name: for people.
            trial: what is this trial's alone within the search.
            course: step → metrics on the way to the end.
        """
        with self.reporting(f"show a trial of {self._search[:12]}"):
            tags = {"errata.trial": f"{self._search}/{trial}", "mlflow.parentRunId": self.run_id}
            run = self.claim_run(self._experiment, name, "errata.trial", tags)
            if run.info.status != _FINISHED:
                self._fill(run.info.run_id, parameters, metrics, course or {})
                self.client.set_terminated(run.info.run_id)

    def conclude(self, parameters: Mapping[str, object], metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """Show what the search has chosen."""
        with self.reporting(f"show what {self._search[:12]} has chosen"):
            if self.client.get_run(self.run_id).info.status != _FINISHED:
                self._fill(self.run_id, parameters, metrics, {})
            for path in files:
                self.client.log_artifact(self.run_id, str(path))
            self.client.set_terminated(self.run_id)

    def _fill(
        self, run_id: str, parameters: Mapping[str, object], metrics: Mapping[str, float], course: Mapping[int, Mapping[str, float]]
    ) -> None:
        moment = self.client.get_run(run_id).info.start_time
        shown = [Param(name, str(value)[:500]) for name, value in parameters.items()]
        steps = [(step, some) for step, some in sorted({0: metrics, **course}.items()) if some]
        self.client.log_batch(
            run_id, [Metric(name, value, moment + step, step) for step, some in steps for name, value in some.items()], shown
        )
