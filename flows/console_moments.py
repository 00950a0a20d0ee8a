"""The command that measures what a base must go on knowing: `moments`."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from errata.settings import load_settings
from flows.commandline import EPILOG, AsJson, CorpusPath, out, print_json
from flows.prefect_server import start_prefect

_TOLERANCE = 0.01


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(moments)


def moments(
    base: Annotated[str, typer.Option(help="'builtin', 'builtin-contextual', a model folder, or a Hugging Face id.")] = "builtin",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id; the newest is pinned without one.")] = None,
    corpus: CorpusPath = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 3-8 or 3,5; without it those of the values published for the family, else all.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Keys to count; 100,000 without it.")] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Independent parts, which an interrupted run need not repeat; 8 without it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the second moments of a base over a corpus, and say how good they are.

    An interrupted run goes on with the shards that it has. Nothing is measured twice: `errata init` and `errata rebase` use what is there.
    """
    settings = load_settings()
    start_prefect(settings)
    from flows.measure import measure_moments
    from tasks.measuring import SHARDS, TOKENS, describe_moments
    from tasks.onboarding import choose_layers, place_base
    from tasks.placing import choose_corpus

    found = place_base(settings, base, revision)
    name, chosen = choose_corpus(found, corpus), choose_layers(found, layers)
    wanted = tokens or TOKENS
    digest = measure_moments(found.ref.digest, chosen, name, wanted, shards or SHARDS)
    facts = describe_moments(settings, digest, _TOLERANCE)
    if as_json:
        print_json(facts)
        return
    out.print(build_table(facts))
    counted = f"{facts['tokens']:,} tokens" + (f" (of {wanted:,} asked for)" if facts["tokens"] < wanted else "")
    out.print(f"{counted} of {escape(name)} in {facts['shards']} shards: moments {digest[:12]} of base {facts['base'][:12]}")
    for line in list_findings(facts):
        out.print(line)


def build_table(facts: dict[str, Any]) -> Table:
    """One line per layer."""
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "width", "rank", "effective rank", "error of C now", f"tokens for {_TOLERANCE:.0%}"):
        table.add_column(column, justify="right")
    for row in facts["layers"]:
        rank = f"{row['rank']:,}" if row["rank"] == row["width"] else f"[yellow]{row['rank']:,}[/]"
        error = "" if row["error"] is None else f"{row['error']:.2%}"
        enough = "" if row["enough"] is None else f"{row['enough']:,}"
        table.add_row(str(row["layer"]), f"{row['width']:,}", rank, f"{row['effective_rank']:,.1f}", error, enough)
    return table


def list_findings(facts: dict[str, Any]) -> list[str]:
    """What follows from the figures, in words."""
    found = []
    if facts["change"] is not None:
        found.append(
            f"{facts['more']:,} more tokens would change λC by {facts['change']:.2%} (layer {facts['slowest']}, the slowest); "
            f"{facts['enough']:,} in all are enough for {_TOLERANCE:.0%}"
        )
    for row in facts["layers"]:
        if row["rank"] < row["width"]:
            why = "fewer tokens than width" if facts["tokens"] < row["width"] else "some keys are never seen"
            found.append(f"[yellow]layer {row['layer']}: C is singular ({why}); what it does not see, no edit spares[/]")
    if facts["faults"]:
        found.append(f"[yellow]{facts['faults']} lines of the corpus could not be read[/]")
    return found
