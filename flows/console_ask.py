"""Commands that ask the model: `ask`, `trace`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from errata.errors import InputError
from flows import views
from flows.commandline import EPILOG, AsJson, StreamName, open_here, out, print_json
from flows.prefect_server import ready_prefect, start_prefect

Facts = Mapping[str, Any]


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (ask, trace):
        app.command(epilog=EPILOG)(command)


def ask(
    prompts: Annotated[list[str], typer.Argument(help="What the model is to continue.")],
    stream: StreamName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 12,
    why: Annotated[bool, typer.Option("--why", help="Say which edits made the champion answer so.")] = False,
    as_json: AsJson = False,
) -> None:
    """Base and champion side by side, greedily."""
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("ask: expected prompts with some text, found an empty one")
    settings, opened = open_here(stream)
    ready_prefect(settings)
    from tasks.asking import answer_prompts, explain_prompts

    rows: Sequence[Facts] = (explain_prompts if why else answer_prompts)(settings, opened, prompts, max_new_tokens)
    if as_json:
        print_json(rows)
        return
    out.print(views.build_answers(rows))
    for row in rows if why else ():
        out.print()
        out.print(build_reasons(row))


def trace(
    stream: Annotated[str | None, typer.Argument(help="Stream; the default is in errata.toml.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Edits to switch off; unless told, all where it is cheap, else 50.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Switch live edits off, each alone: does the answer change, and does the base's come back? Changes nothing."""
    settings, opened = open_here(stream)
    start_prefect(settings)
    from flows.traceability import trace_edits

    facts = trace_edits(opened.name, sample, seed).model_dump(mode="json")
    print_json(facts) if as_json else out.print(build_trace(facts))


def build_reasons(row: Facts) -> RenderableType:
    """Why the champion answers a prompt as it does."""
    parts: list[RenderableType] = [f"[bold]{escape(row['prompt'])}[/] → {escape(row['champion'])}"]
    if not any(row[name] for name in ("neurons", "deltas", "memory", "absorbed")):
        return Group(*parts, "no edit is live: the champion is the base")
    tokens = Table(box=None, pad_edge=False)
    for name in ("token", "prob.", "base"):
        tokens.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    if row["neurons"]:
        parts.append(f"{row['neurons']} neurons were asked at each token")
        for name in ("cosine", "θ", "activation", "what happened", "nearest neuron of another edit", "margin"):
            tokens.add_column(name, justify="right" if name in ("cosine", "θ", "activation", "margin") else "left", overflow="fold")
    shown = row["tokens"] if row["neurons"] else row["tokens"][:1]
    for token in shown:
        cells = [escape(repr(token["token"])), f"{token['probability']:.3f}", f"{token['base_probability']:.3f}"]
        tokens.add_row(*cells, *(_spell_firing(token) if "told" in token else ()))
    parts += [tokens]
    if row["deltas"]:
        at = f"token {row['at']['token'] + 1} of the prompt, {escape(repr(row['at']['text']))}"
        shares = ", ".join(f"layer {layer} {share:.3f}" for layer, share in row["deltas"].items())
        parts += ["", f"at {at}, the edits add to what the weights say (‖ΔW k‖ / ‖W0 k‖): {shares}"]
        parts += [f"nearest of {row['compared']} live keys:", _build_near(row["near"])]
    if row["memory"]:
        parts += ["", *_build_route(row["memory"])]
    if row["absorbed"]:
        parts += ["", f"an adapter that has taken in {row['absorbed']} edits is on the weights"]
    return Group(*parts)


_CASES = {
    1: "the prompt is that of a live edit",
    2: "it names the subject of one fact",
    3: "it names subjects of several facts",
    4: "it names no subject",
}


def _build_route(memory: Facts) -> list[RenderableType]:
    """What memory made of a prompt."""
    names = f" ({escape(', '.join(memory['names']))})" if memory["names"] else ""
    answer = f"put before it: {_spell_edit(memory['fact'])}" if memory["fact"] else "nothing was put before it"
    parts: list[RenderableType] = [f"memory, case {memory['case']}: {_CASES[memory['case']]}{names}; {answer}"]
    if memory["scores"]:
        floor = "" if memory["floor"] is None else f", at least {memory['floor']:.3f} wanted"
        table = Table(box=None, pad_edge=False)
        table.add_column(f"similarity{floor}", justify="right")
        table.add_column("edit", overflow="fold")
        for score in memory["scores"][:5]:
            table.add_row(f"{score['similarity']:.3f}", _spell_edit(score["edit"]))
        parts.append(table)
    return parts


def _build_near(rows: Sequence[Facts]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("cosine", "by layer", "at token", "edit"):
        table.add_column(name, justify="right" if name == "cosine" else "left", overflow="fold")
    for near in rows:
        layers = ", ".join(f"{layer}: {cosine:.3f}" for layer, cosine in near["layers"].items())
        said = "; ".join(_spell_edit(edit) for edit in near["edits"])
        table.add_row(f"{near['cosine']:.3f}", layers, f"{near['token'] + 1} {escape(repr(near['text']))}", said)
    return table


def _spell_firing(token: Facts) -> tuple[str, ...]:
    """The cells of a token of the answer that say what its neuron did."""
    neuron = _spell_neuron(token["neuron"])
    match token["told"]:
        case "fired":
            said = f"[green]fired[/]: {neuron}"
        case "tombstone":
            said = f"[magenta]caught by a tombstone[/], nothing added: {neuron}"
        case _:
            said = f"[yellow]none fired[/]; nearest, {token['threshold'] - token['cosine']:.3f} below θ: {neuron}"
    rival = _spell_neuron(token["rival"]) if token["rival"] else "–"
    margin = "–" if token["margin"] is None else f"{token['margin']:.3f}"
    return f"{token['cosine']:.3f}", f"{token['threshold']:.2f}", f"{token['activation']:.1f}", said, rival, margin


def _spell_neuron(place: Facts) -> str:
    return "; ".join(f"token {place['token']} of {_spell_edit(edit)}" for edit in place["edits"]) + (
        "" if place["live"] else " (withdrawn)"
    )


def _spell_edit(edit: Facts) -> str:
    """The name of an edit with what it says."""
    name = f"[bold]{escape(edit['occurrence'] or edit['id'])}[/]"
    return f"{name} {escape(edit['prompt'])} → {escape(edit['target'])}" if "prompt" in edit else f"{name} ({edit['status'] or 'unknown'})"


def build_trace(facts: Facts) -> RenderableType:
    """What the withdrawal test found."""
    measured = facts["measured"]
    own = measured["retrieve_success_own"]["edits"]
    rows = [
        ("champion", f"commit {facts['commit']} of [bold]{escape(facts['stream'])}[/], {measured['live']} live edits"),
        (
            "switched off",
            f"{measured['retrieve_success']['edits']} edits, each alone (seed {facts['seed']}); took {facts['seconds']:.1f} s",
        ),
        ("retrieve success", f"{_show_percent(measured['retrieve_success'])}: the answer changes without the edit"),
        ("consistency", f"{_show_percent(measured['consistency'])}: the answer is the base's then"),
        ("left aside", f"{measured['known']} whose target the base predicts anyway, {measured['untaken']} that do not take"),
        (
            "of the other " + str(own),
            f"retrieve success {_show_percent(measured['retrieve_success_own'])}, consistency {_show_percent(measured['consistency_own'])}",
        ),
    ]
    if not measured["worst"]:
        return views.build_pairs(rows)
    table = Table(title=f"{measured['failing']} edits fail one or both; the first {len(measured['worst'])}", box=None, pad_edge=False)
    for name in ("edit", "target", "base", "with all", "without it", "fails"):
        table.add_column(name, overflow="fold")
    for row in measured["worst"]:
        fails = " and ".join(name for name in ("retrieved", "consistent") if not row[name])
        note = ", known to the base" if row["known"] else "" if row["taken"] else ", does not take"
        table.add_row(*(escape(row[name]) for name in ("id", "target", "base", "edited", "without")), f"not {fails}{note}")
    return Group(views.build_pairs(rows), "", table)


def _show_percent(share: Facts) -> str:
    return "–" if share["percent"] is None else f"{share['percent']:.1f} %"
