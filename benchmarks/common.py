"""What the benchmarks share: the built-in base with its editor, a place for objects, and a stopwatch."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress

from errata.builtin import BUILTIN, BuiltinSettings, ensure_builtin
from errata.editors.base import Blobs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.edits import digest_of
from errata.modeling.loading import Base, load_base
from errata.profiles import Profile, SolveOptions
from errata.settings import load_settings
from errata.suggestions import suggest_builtin
from errata.world import World, make_world
from tasks._session import quiet_transformers


class MemoryBlobs(Blobs):
    """Objects in memory, under their digest."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def get(self, digest: str) -> bytes:
        return self._objects[digest]

    def put(self, data: bytes) -> str:
        digest = digest_of(data)
        self._objects[digest] = data
        return digest


class Stopwatch:
    """Wall and CPU seconds by stage."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def load_builtin(settings: BuiltinSettings = BUILTIN) -> tuple[Base, D4S, World]:
    """A built-in base (trained once, then cached), D4S with its profile, and its world."""
    quiet_transformers()
    with Progress(transient=True) as progress:
        task = progress.add_task("training the built-in base", total=None)
        folder = ensure_builtin(settings, load_settings().cache, lambda done, total, _: progress.update(task, completed=done, total=total))
    base, world, suggested = load_base(folder, device="cpu"), make_world(settings.world), suggest_builtin(settings.digest)
    moments = collect_moments(base, suggested.prepare.layers, world.corpus(seed=0))
    solve = SolveOptions(lam=suggested.lam, spread="even", moments=digest_of(moments.to_bytes()))
    profile = Profile(base=base.digest, prepare=suggested.prepare, solve=solve)
    return base, D4S(profile, moments, base.layout), world
