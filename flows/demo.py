"""`errata demo`: the main job on the built-in base, small enough to watch. Every run makes a stream of its own in `.errata-demo`."""

import os
import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from errata.builtin import CAVEAT
from errata.editors.catalogue import require_editor
from errata.edits import Edit, Submission, canonical_json, spell_submission
from errata.errors import RegistryError, UnknownNameError
from errata.redaction import redact
from errata.settings import Settings
from errata.world import make_world
from flows import lookup, views
from flows.edit import apply_edits
from registry.inbox import drop_file, drop_lines
from registry.storage.base import open_storage
from registry.stream import Stream, list_streams
from tasks.asking import answer_prompts
from tasks.onboarding import BUILTIN_NAME, start_stream
from tasks.projecting import open_registry

ROOT = ".errata-demo"
_BATCH = 20
_BATCHES = 3
_NAME = re.compile(r"demo-(\d+)")


def run_demo(settings: Settings, out: Console, editor: str) -> None:
    """Submit, apply, ask: with a malformed record, a duplicate and a replacement among the edits."""
    require_editor(editor)
    root = Path(ROOT).absolute()
    os.environ |= {"ERRATA_ROOT": str(root), "ERRATA_APPLY__BATCH_SIZE": str(_BATCH), "ERRATA_STREAM": _next_name(str(root))}
    settings = Settings(cache=settings.cache, device=settings.device, threads=settings.threads)
    out.rule(f"stream {settings.stream} on the built-in base, written by {editor}")
    out.print(f"[dim]{CAVEAT}[/]\n")
    stream = start_stream(settings, BUILTIN_NAME, editor=editor)
    edits = make_world().make_edits(_BATCH * _BATCHES, seed=0)
    _submit(stream, edits, out)
    out.rule("apply")
    summaries = [summary.model_dump(mode="json") for summary in apply_edits(stream.name)]
    stream.refresh()
    out.print(views.build_batches(summaries))
    _ask(settings, stream, edits, out)
    _point_further(settings, stream, out)


def _submit(stream: Stream, edits: list[Edit], out: Console) -> None:
    first, rest = edits[:_BATCH], edits[_BATCH:]
    lines = [spell_submission(Submission(edit=edit, origin=f"demo[{index}]")) for index, edit in enumerate(first)]
    drop_lines(stream, lines)
    changed = first[0].model_copy(
        update={"target_new": first[1].target_true if first[1].relation_id == first[0].relation_id else first[0].target_true}
    )
    malformed = canonical_json({"subject": "Nobody", "prompt": "A prompt without a slot", "target_new": "nothing"})
    second = [malformed, lines[1], spell_submission(Submission(edit=changed, origin="demo replacement"))]
    second += [spell_submission(Submission(edit=edit, origin=f"demo[{_BATCH + index}]")) for index, edit in enumerate(rest)]
    drop_file(stream, "later.jsonl", b"\n".join(second) + b"\n")
    out.print(f"{len(lines)} edits in a first file; {len(second)} records in a second: one malformed, one a duplicate, one a replacement\n")


def _ask(settings: Settings, stream: Stream, edits: list[Edit], out: Console) -> None:
    prompts = [edit.rewrite_prompt for edit in edits[1:4]] + [edits[1].paraphrase_prompts[0], edits[1].neighborhood_prompts[0].prompt]
    out.rule("before and after: three edits, a paraphrase, a neighbour that must not move")
    out.print(views.build_answers(answer_prompts(settings, stream, prompts, max_new_tokens=4)))
    registry = open_registry(settings)
    version = registry.champion(stream.name)
    answers = registry.load_champion(stream.name).predict(prompts[:1], params={"max_new_tokens": 4})
    out.print(
        f"\nmodels:/{stream.name}@champion is version {version.number if version else '?'} and answers: {escape(prompts[0] + answers[0])}"
    )


def _point_further(settings: Settings, stream: Stream, out: Console) -> None:
    registry = open_registry(settings)
    out.rule("look further")
    version = registry.find_version(stream.name, stream.head.champion)
    try:
        plot = str(registry.save_plot(version, Path(settings.root) / "plots" / stream.name)) if version else "none"
    except RegistryError:
        plot = "none: no weight was changed"
    refused = [
        row
        for seq in range(1, stream.head.seq + 1)
        for row in lookup.describe_commit_whole(stream, seq)["records"]
        if row["outcome"] == "refused"
    ]
    out.print(
        views.build_pairs(
            [
                ("norm plot", escape(plot)),
                ("refused", escape(f"{refused[0]['origin']}: {refused[0]['reason']}" if refused else "nothing")),
                ("the log", f"ERRATA_ROOT={ROOT} errata log --stream {stream.name}"),
                ("one commit", f"ERRATA_ROOT={ROOT} errata show head --stream {stream.name}"),
                ("a page", f"ERRATA_ROOT={ROOT} errata report --stream {stream.name} --open"),
                ("MLflow", f"mlflow ui --backend-store-uri {escape(redact(registry.tracking_uri))}"),
                ("Prefect", f"PREFECT_HOME={escape(str(settings.cache / 'prefect'))} prefect server start"),
            ]
        )
    )


def _next_name(root: str) -> str:
    try:
        taken = [int(found[1]) for name in list_streams(open_storage(root)) if (found := _NAME.fullmatch(name))]
    except UnknownNameError:
        taken = []
    return f"demo-{max(taken, default=0) + 1}"
