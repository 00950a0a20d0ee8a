"""The command that solves a stream under another profile: `adopt`."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from flows import views
from flows.commandline import EPILOG, REFUSED, AsJson, open_here, out, print_json
from flows.prefect_server import start_prefect


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(adopt)


def adopt(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Whose live edits.")],
    profile: Annotated[str, typer.Option(help="JSON file, or the digest of a stored profile of the same base; a beginning of it will do.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Solve, evaluate and decide; commit nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Solve the live edits under another solve part (λ, spread, second moments) and write a version of it.

    The stored sums are solved anew: no edit is prepared again, however many there are. A sample of the live edits is evaluated and the gate
    decides. `errata rollback` leads back. For other layers, contexts or keys there is `errata rebase`.
    """
    settings, opened = open_here(stream)
    start_prefect(settings)
    from tasks.placing import place_solve

    placed = place_solve(settings, opened, profile)
    from flows.adopt import adopt as solve_anew

    facts = solve_anew(opened.name, placed, dry_run).model_dump(mode="json")
    print_json(facts) if as_json else show_adoption(facts)
    if facts["decision"] != "accept":
        raise typer.Exit(REFUSED)


def show_adoption(facts: dict[str, Any]) -> None:
    """Print what became of an adoption."""
    metrics = facts["metrics"]
    shown = (("retention", "retention"), ("generalization", "held_out.generalization"), ("specificity", "held_out.specificity"))
    ratios = [value for name, value in metrics.items() if name.endswith("mean_abs_ratio")]
    commit = "none" if facts["commit"] is None else str(facts["commit"])
    out.print(
        views.build_pairs(
            [
                ("decision", f"{views.paint(facts['decision'])}, commit {commit}"),
                ("profile", facts["profile"][:12]),
                ("sums", "of all live pairs, summed anew" if facts["summed"] else "as they were, solved anew"),
                ("live", f"{facts['live']} edits"),
                *((name, views.show_share(metrics.get(key))) for name, key in shown),
                ("mean |W|", f"{max(ratios):.3f} times the base's at most" if ratios else "–"),
                ("reasons", escape(" ".join(facts["reasons"])) or "–"),
            ]
        )
    )
