"""What `errata up` shows: where everything is, how the streams stand, and the last lines of what happens."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from errata.errors import ErrataError
from flows import views
from flows.prefect_runs import show_time
from registry.inbox import list_waiting
from registry.stream import Stream

LINES = 12
"""Of what happened, on the screen."""


def describe_places(places: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and place, for people."""
    shown = [("Prefect", "prefect"), ("MLflow", "mlflow"), ("metrics", "metrics"), ("root", "root"), ("logs", "logs")]
    rows = [(label, places[key]) for label, key in shown if places.get(key)]
    return [*rows, ("streams", ", ".join(places["streams"])), ("process", str(places["pid"]))]


def describe_streams(streams: Sequence[Stream]) -> list[list[str]]:
    """A row for each: name, champion, live edits, files that wait, newest commit."""
    rows = []
    for stream in streams:
        try:
            head, newest = stream.refresh(), stream.log.read(stream.head.seq)
            live, waiting = stream.index.counts().get("live", 0), len(list_waiting(stream))
        except ErrataError as error:
            rows.append([stream.name, "?", "?", "?", str(error)])
            continue
        rows.append([stream.name, str(head.champion), str(live), str(waiting), f"{newest.seq} {newest.kind} {_show_age(newest.time)}"])
    return rows


def tell_commits(stream: Stream, after: int) -> Iterator[tuple[str, str]]:
    """Time and text of the commits since one."""
    for seq in range(after + 1, stream.head.seq + 1):
        commit = stream.log.read(seq)
        champion = "; it is the champion" if stream.head.champion == seq else ""
        yield commit.time.isoformat(), f"{stream.name}  commit {seq}: {commit.kind}, {commit.decision or 'done'}{champion}"


def build_screen(places: dict[str, Any], streams: list[list[str]], following: str | None, lines: Sequence[str]) -> RenderableType:
    """All of it."""
    where = views.build_pairs([(label, escape(place)) for label, place in describe_places(places)[:-2]])
    table = Table(box=None, pad_edge=False)
    for column in ("stream", "champion", "live", "files waiting", "newest commit"):
        table.add_column(column, justify="left" if column in ("stream", "newest commit") else "right")
    for row in streams:
        table.add_row(*map(escape, row))
    happened = "\n".join(escape(line) for line in lines[-LINES:]) or "nothing yet"
    return Group(
        Panel(where, title="errata up", subtitle="Ctrl-C stops everything"),
        Panel(table, title="streams", subtitle=escape(f"next: {following or 'nothing is scheduled'}")),
        Panel(happened, title="what happened"),
    )


def spell_line(moment: str, text: str) -> str:
    return f"{show_time(moment)}  {text}"


def _show_age(moment: datetime) -> str:
    return f"{views.show_age((datetime.now(UTC) - moment).total_seconds())} ago"
