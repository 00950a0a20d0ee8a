"""`adopt`: the live edits are solved under another profile, whose prepare part is the one they were prepared with."""

from prefect import flow

from errata.errors import InputError
from errata.summary import AdoptionSummary
from tasks._conflicts import repeat_on_conflict
from tasks.adopting import commit_adoption, judge_adoption, order_adoption, solve_anew
from tasks.projecting import project_versions


@flow(name="adopt")
def adopt(stream: str, profile: str, dry_run: bool = False) -> AdoptionSummary:
    """Solve a stream's sums anew with another λ, spread or second moments; its own commit and version.

    Args:
        stream: whose sums.
        profile: digest of a profile of its base (`tasks.onboarding.place_solve`).
        dry_run: solve, evaluate and judge, and commit nothing.

    Returns:
        What became of it. A refusal by the gate is a result; a fault is raised.
    """

    def attempt() -> AdoptionSummary:
        order = order_adoption(stream, profile)
        return commit_adoption(stream, order, judge_adoption(stream, order, solve_anew(stream, order)), dry_run)

    try:
        summary = repeat_on_conflict(attempt, "the new sums are solved and judged")
    except InputError:
        if not dry_run:
            project_versions(stream)  # it may be done already, by a run that died before its version was shown
        raise
    if not dry_run:
        project_versions(stream)
    return summary
