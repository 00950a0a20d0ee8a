"""The `errata` command. Reading commands import no torch, Prefect or MLflow and answer in about a second."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from errata.edits import Refusal, Submission, spell_submission
from errata.errors import ErrataError, InputError
from errata.logs import start_logs
from errata.settings import load_settings
from flows import (
    console_adopt,
    console_alerts,
    console_approval,
    console_ask,
    console_bench,
    console_calibrate,
    console_erase,
    console_inbox,
    console_keep,
    console_longrun,
    console_memory,
    console_merge,
    console_moments,
    console_plan,
    console_rebase,
    console_replay,
    console_report,
    console_undo,
    console_up,
    console_watch,
    lookup,
    views,
)
from flows.commandline import (
    EPILOG,
    REFUSED,
    AsJson,
    CorpusPath,
    Editor,
    StreamName,
    Yes,
    confirm,
    open_here,
    out,
    print_json,
    show_committed,
)
from flows.prefect_server import ready_prefect, start_prefect
from registry.inbox import drop_lines

INTERRUPTED = 130

app = typer.Typer(
    help="Keeps a deployed language model's facts correct, day after day, without retraining.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
quarantine = typer.Typer(help="Edits that the gate refused: list, retry or drop them.", epilog=EPILOG)
app.add_typer(quarantine, name="quarantine")


def main() -> None:
    """Entry point: turns the errors of the project into one line and an exit code."""
    start_logs()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except ErrataError as error:
        views.print_error(str(error))
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as error:
        if message := error.format_message():  # empty where the help that was asked for without saying so has been printed
            views.print_error(f"{message.rstrip('.')}; see errata --help")
        code = InputError.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains about it once more at exit
        code = 0
    if code == INTERRUPTED:  # typer answers Ctrl-C with this code
        views.print_error("interrupted; nothing is lost, the next run goes on from here", mark="")
    sys.exit(code if isinstance(code, int) else 0)


@app.command(epilog=EPILOG)
def init(
    stream: StreamName = None,
    base: Annotated[str, typer.Option(help="'builtin', 'builtin-contextual', a model folder, or a Hugging Face id.")] = "builtin",
    editor: Editor = "d4s",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id; the newest is pinned without one.")] = None,
    profile: Annotated[str | None, typer.Option(help="JSON file with the editor's options, or a stored profile's digest.")] = None,
    corpus: CorpusPath = None,
) -> None:
    """Make a stream: load the base, measure what the editor has to know of it, write the first commit."""
    settings = load_settings(stream=stream)
    ready_prefect(settings)
    from tasks.onboarding import start_stream

    made = start_stream(settings, base, editor=editor, revision=revision, profile=profile, corpus=corpus)
    placed = f"on base {made.head.base[:12]}, profile {made.head.profile[:12]}"
    out.print(f"stream [bold]{made.name}[/] in {escape(made.storage.url)}: {editor} {placed}")
    out.print("next: [bold]errata submit FILE[/], then [bold]errata apply[/]")


@app.command(epilog=EPILOG)
def submit(
    files: Annotated[
        list[str] | None, typer.Argument(help="JSONL or JSON of edits (our own, CounterFact, zsRE, KnowEdit); '-' is stdin.")
    ] = None,
    stream: StreamName = None,
    prompt: Annotated[str | None, typer.Option(help="One edit without a file: its prompt, with {} where the subject stands.")] = None,
    subject: Annotated[str | None, typer.Option(help="Its subject.")] = None,
    target: Annotated[str | None, typer.Option(help="Its new target.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what would become of the records.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Propose edits again that were refused or withdrawn before.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Propose edits although they are older than what they replace.")] = False,
    urgent: Annotated[bool, typer.Option("--urgent", help="Goes before everything that waits.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Answer from memory at once, until the next batch writes them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate edits and leave the good ones in the stream's inbox. Bad records are refused one by one; the file is left as it is."""
    records = (insist(record, again, force) for record in read_sources(files or [], prompt, subject, target))
    if check:
        check_records(records, stream, as_json)
        return
    settings, opened = open_here(stream)
    lines, refused = [], []
    for record in records:
        if isinstance(record, Refusal):
            refused.append(record)
        else:
            lines.append(spell_submission(record))
    name = drop_lines(opened, lines, urgent=urgent) if lines else None
    if as_json:
        print_json({"stream": opened.name, "submitted": len(lines), "file": name, "refused": [item.model_dump() for item in refused]})
    else:
        for item in refused:
            views.print_error(f"refused: {item}")
        waiting = f" in inbox/{name}; [bold]errata apply[/] writes them" if name else ""
        out.print(f"{len(lines)} edits submitted to [bold]{opened.name}[/], {len(refused)} records refused{waiting}")
    if not lines:
        raise typer.Exit(InputError.exit_code)
    if now:
        console_memory.remember_waiting(settings, opened.name, as_json)


def read_sources(files: Sequence[str], prompt: str | None, subject: str | None, target: str | None) -> Any:
    """Records of files, stdin, or of the options of one edit."""
    from itertools import chain

    from errata.readers.files import read_edits
    from errata.readers.records import read_record

    options = {"prompt": prompt, "subject": subject, "target_new": target}
    if any(value is not None for value in options.values()):
        if files:
            raise InputError("submit: expected files, or --prompt, --subject and --target, found both")
        missing = [f"--{name.removesuffix('_new')}" for name, value in options.items() if value is None]
        if missing:
            raise InputError(f"submit: expected --prompt, --subject and --target, found no {' and '.join(missing)}")
        return [read_record(options, "command line")]
    if not files:
        raise InputError("submit: expected a file, '-', or --prompt, --subject and --target; found none")
    return chain.from_iterable(read_edits(sys.stdin.buffer, "stdin") if name == "-" else read_edits(name) for name in files)


def insist(record: Submission | Refusal, again: bool, force: bool) -> Submission | Refusal:
    """The record with what the command line asks for besides what it asks for itself."""
    if isinstance(record, Refusal):
        return record
    return record.model_copy(update={"again": record.again or again, "force": record.force or force})


def check_records(records: Any, name: str | None, as_json: bool) -> None:
    """`submit --check`: against the stream where there is one."""
    from errata.errors import UnknownNameError
    from errata.gate import digest_judgement
    from errata.readers.report import check_edits

    try:
        settings, opened = open_here(name)
        report = check_edits(records, opened.index, digest_judgement(settings.gate, opened.head.profile))
    except UnknownNameError:
        if name is not None:
            raise
        report = check_edits(records)
    facts = report.to_json()
    if as_json:
        print_json(facts)
    else:
        out.print(views.build_check(facts))
    if report.refused == report.records:
        raise typer.Exit(InputError.exit_code)


@app.command(epilog=EPILOG)
def apply(
    stream: StreamName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prepare, evaluate and decide the first batch; commit nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write what waits in the inbox into the model, batch by batch; accepted versions become the champion."""
    settings, opened = open_here(stream)
    waiting = lookup.count_pending(opened) + len(opened.index.find_unwritten())
    if not waiting:
        if not dry_run:
            show_committed(settings, opened)
        if as_json:
            print_json([])
        else:
            out.print(f"nothing waits in the inbox of [bold]{opened.name}[/]")
        return
    if not dry_run:
        confirm(f"{waiting} records wait. What the gate accepts becomes the champion of {opened.name!r}. Go on?", yes)
    start_prefect(settings)
    from flows.edit import apply_edits

    summaries = [summary.model_dump(mode="json") for summary in apply_edits(opened.name, dry_run)]
    if as_json:
        print_json(summaries)
    else:
        out.print(views.build_batches(summaries))
        for summary in summaries:
            for reason in summary["reasons"] if summary["decision"] in ("reject", "hold") or summary["outcomes"].get("quarantined") else ():
                out.print(f"[dim]batch {summary['commit'] or ''}:[/] {escape(reason)}")
        if dry_run:
            out.print(
                f"{views.show_seconds(summaries[0]['seconds'])}; peak memory {summaries[0]['peak_mb']:.0f} MiB; nothing was committed"
            )
    if any(summary["decision"] == "reject" for summary in summaries):
        raise typer.Exit(REFUSED)


@app.command(epilog=EPILOG)
def status(stream: StreamName = None, as_json: AsJson = False) -> None:
    """Live, pending and quarantined edits, age of the champion, cost of the last batch."""
    facts = lookup.describe_status(*open_here(stream))
    print_json(facts) if as_json else out.print(views.build_status(facts))


@app.command(epilog=EPILOG)
def log(
    stream: StreamName = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Newest commits to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The newest commits; '*' marks the champion."""
    rows = lookup.describe_log(open_here(stream)[1], count)
    print_json(rows) if as_json else out.print(views.build_log(rows))


@app.command(epilog=EPILOG)
def show(
    reference: Annotated[str, typer.Argument(metavar="EDIT|COMMIT", help="12, head~1, v3, or an edit's id or the beginning of one.")],
    stream: StreamName = None,
    as_json: AsJson = False,
) -> None:
    """A commit with what became of its records, or an edit with its history."""
    settings, opened = open_here(stream)
    found = lookup.resolve_reference(settings, opened, reference)
    if isinstance(found, int):
        facts = lookup.describe_commit_whole(opened, found)
        print_json(facts) if as_json else out.print(views.build_commit(facts))
    else:
        facts = lookup.describe_edit(opened, found)
        print_json(facts) if as_json else out.print(views.build_edit(facts))


@quarantine.callback(invoke_without_command=True)
def list_quarantine(context: typer.Context, stream: StreamName = None, as_json: AsJson = False) -> None:
    """Edits that the gate refused, and why."""
    if context.invoked_subcommand is not None:
        return
    rows = lookup.describe_quarantine(open_here(stream)[1])
    if as_json:
        print_json(rows)
    elif rows:
        out.print(views.build_quarantine(rows))
    else:
        out.print("nothing is quarantined")


Chosen = Annotated[list[str] | None, typer.Argument(metavar="EDIT…", help="Ids, or beginnings of ids.")]
Every = Annotated[bool, typer.Option("--all", help="Every edit in quarantine.")]


@quarantine.command("retry", epilog=EPILOG)
def retry(edits: Chosen = None, every: Every = False, stream: StreamName = None) -> None:
    """Put quarantined edits into the inbox once more."""
    _, opened = open_here(stream)
    rows = lookup.choose_quarantined(opened, edits or [], every)
    # The origin also makes every retry a file of its own: one with the bytes of an earlier retry would count as consumed.
    records = [Submission(edit=opened.read_record(row).edit, origin=f"retry of {row.occurrence}", again=True) for row in rows]
    name = drop_lines(opened, [spell_submission(record) for record in records])
    out.print(f"{len(rows)} edits are in inbox/{name}; [bold]errata apply[/] tries them again")


@quarantine.command("drop", epilog=EPILOG)
def drop(
    edits: Chosen = None,
    every: Every = False,
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "dropped by hand",
    stream: StreamName = None,
    yes: Yes = False,
) -> None:
    """Give quarantined edits up: a commit of its own; the model does not change."""
    settings, opened = open_here(stream)
    rows = lookup.choose_quarantined(opened, edits or [], every)
    confirm(f"drop {len(rows)} edits?", yes)
    ready_prefect(settings)
    from tasks.committing import drop_edits

    seq = drop_edits(settings, opened, rows, reason)
    out.print(f"{len(rows)} edits dropped in commit {seq}")


@app.command(epilog=EPILOG)
def repair(stream: StreamName = None) -> None:
    """Make MLflow show what the log says, and tidy the inbox. Safe to repeat."""
    settings, opened = open_here(stream)
    ready_prefect(settings)
    from tasks.erasing import hide_versions
    from tasks.projecting import show_log

    version, made = show_log(settings, opened, everything=True)
    hide_versions(settings, opened)
    shown = f"version {version} (commit {opened.head.champion})" if version else "nothing yet: no batch has been accepted"
    out.print(f"{made} versions made; [bold]{opened.name}@champion[/] is {shown}; {lookup.count_pending(opened)} records wait")


@app.command(epilog=EPILOG)
def doctor(stream: StreamName = None, as_json: AsJson = False) -> None:
    """What is installed, reachable and writable, and what to do about what is not."""
    settings = load_settings(stream=stream)
    ready_prefect(settings)
    from flows.diagnosis import diagnose

    findings = diagnose(settings)
    print_json(findings) if as_json else out.print(views.build_findings(findings))
    if any(finding["state"] == "fault" for finding in findings):
        raise typer.Exit(1)


@app.command(epilog=EPILOG)
def demo(editor: Editor = "d4s") -> None:
    """Several batches on the built-in base, from submission to an answering MLflow version, and where to look further."""
    settings = load_settings()
    start_prefect(settings)
    from flows.demo import run_demo

    run_demo(settings, out, editor)


console_undo.add_commands(app)
console_ask.add_commands(app)
console_calibrate.add_commands(app)
console_bench.add_commands(app)
console_approval.add_commands(app)
console_merge.add_commands(app)
console_moments.add_commands(app)
console_plan.add_commands(app)
console_rebase.add_commands(app)
console_adopt.add_commands(app)
console_memory.add_commands(app)
console_replay.add_commands(app)
console_longrun.add_commands(app)
console_erase.add_commands(app)
console_keep.add_commands(app)
console_inbox.add_commands(app)
console_report.add_commands(app)
console_watch.add_commands(app)
console_alerts.add_commands(app)
console_up.add_commands(app)
