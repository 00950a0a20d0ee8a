"""Progress bars of long stages: on a terminal a bar, elsewhere nothing, since the stage's own log line tells the rest."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar named `title`; the body calls the yielded function with (done, total)."""
    with _show(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def show_rate(title: str, unit: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of work that is cut into parts, with its speed; the body calls the yielded function with (part, done of it), both in any
    order, and from any thread."""
    parts: dict[int, int] = {}
    with _show(MofNCompleteColumn(), _RateColumn(unit), TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=total)

        def tell(part: int, done: int) -> None:
            parts[part] = done
            progress.update(task, completed=sum(tuple(parts.values())))

        yield tell


@contextmanager
def show_training(title: str) -> Iterator[Callable[[str, int, int, Mapping[str, float]], None]]:
    """A bar of work in stages, one after the other; the body calls the yielded function with (stage, done, total, losses by name)."""
    with _show(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
            said = "".join(f", {name} {value:.3f}" for name, value in losses.items())
            if stage not in tasks:
                tasks[stage] = progress.add_task(title, total=total)
            progress.update(tasks[stage], description=f"{title}: {stage}{said}", completed=done, total=total)

        yield tell


class _RateColumn(ProgressColumn):
    """Speed of late, in units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


@contextmanager
def _show(*columns: ProgressColumn) -> Iterator[Progress]:
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield progress
