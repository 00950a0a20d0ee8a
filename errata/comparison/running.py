"""One cell: a stream written into the base by one method, batch by batch, and measured on its way."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil
import torch

from errata.comparison.asking import Sheet
from errata.comparison.cells import Cell, CellResult, EditRow, Point, list_stops
from errata.comparison.method import Bench, Recipe, UnsuitedError
from errata.edits import Edit
from errata.errors import ErrataError

Told = Callable[[int], None]
"""Called with the edits written since the last call."""

_EVERY = 0.02
"""Seconds between two looks at the memory."""


def run_cell(bench: Bench, recipe: Recipe, edits: Sequence[Edit], cell: Cell, sheet: Sheet, tell: Told) -> CellResult:
    """Write `edits` and measure at the stops. What ends a method, such as a weight that is not finite, is a result, and said in it."""
    began = time.perf_counter()
    stops = list_stops(len(edits), cell.batch)
    points: list[Point] = []
    rows: list[EditRow] = []
    written, fault, unsuited = 0, "", False
    refused: dict[str, str] = {}
    meter = _Meter(bench.base.device)
    try:
        method = recipe.build(bench)
        for start in range(0, len(edits), cell.batch):
            chunk = edits[start : start + cell.batch]
            with meter.writing():
                method.write(chunk)
            written += len(chunk)
            refused |= method.refused
            tell(len(chunk))
            if written == len(edits) or (written in stops and not recipe.final_only):
                with meter.building():
                    artifacts = method.build_artifacts()
                point, found = sheet.ask(artifacts, written)
                costs = {**meter.tell(written), "state_bytes": float(method.count_bytes())}
                points.append(point.model_copy(update={"values": {**point.values, **costs}}))
                rows += found
    except (ErrataError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        fault, unsuited = f"after {written:,} edits: {error}", isinstance(error, UnsuitedError)
        tell(len(edits) - written)
    return CellResult(
        cell=cell,
        fault=fault,
        unsuited=unsuited,
        written=written,
        points=tuple(points),
        rows=tuple(rows),
        refused=refused,
        seconds=round(time.perf_counter() - began, 2),
        device=str(bench.base.device),
        load=round(os.getloadavg()[0], 2),
    )


@dataclass
class _Meter:
    """CPU seconds and memory of a method alone: what measuring takes is not counted."""

    device: torch.device
    write_seconds: float = 0.0
    build_seconds: float = 0.0
    peak: int = 0
    """Bytes."""
    _floor: int = field(init=False)

    def __post_init__(self) -> None:
        self._floor = self._read()

    @contextmanager
    def writing(self) -> Iterator[None]:
        begun = self._now()
        with _Watch(self._read) as watch:
            yield
        self.write_seconds += self._now() - begun
        self.peak = max(self.peak, watch.most - self._floor)

    @contextmanager
    def building(self) -> Iterator[None]:
        begun = self._now()
        yield
        self.build_seconds = self._now() - begun

    def tell(self, written: int) -> dict[str, float]:
        return {"write_seconds": self.write_seconds / written, "build_seconds": self.build_seconds, "peak_mib": self.peak / 2**20}

    def _read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def _now(self) -> float:
        """CPU seconds of this process; on a GPU wall seconds, once it is through."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Watch(threading.Thread):
    """Looks at the memory every now and then while the block runs."""

    def __init__(self, read: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self._read, self._ended = read, threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self._ended.wait(_EVERY):
            self.most = max(self.most, self._read())

    def __enter__(self) -> Self:
        self.most = self._read()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self.join()
        self.most = max(self.most, self._read())
