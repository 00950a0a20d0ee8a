"""One opening of a stream, in a process of its own: `python -m benchmarks.opening ROOT STREAM CACHE` prints what it took as JSON."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from registry.storage.base import Storage, open_storage
from registry.stream import open_stream


class CountingStorage:
    """A storage that counts what it is asked, and what it lists."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.asked = storage, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not callable(found):
            return found
        self.asked[name] += 1
        return found

    def list(self, prefix: str) -> Any:
        self.asked["list"] += 1
        for entry in self._storage.list(prefix):
            self.asked["listed"] += 1
            yield entry


def measure_opening(root: str, stream: str, cache: Path) -> dict[str, Any]:
    """Seconds, CPU seconds, MiB of memory beyond what the process had, and requests, to stand at the head of a stream."""
    storage = CountingStorage(open_storage(root))
    # Not getrusage: its peak is inherited from whoever started this process.
    reset_peak()
    before = read_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    opened = open_stream(storage, stream, cache)  # type: ignore[arg-type]  # it is one, by delegation
    facts = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "head": opened.head.seq}
    return facts | {"mib": read_peak() - before, "asked": dict(storage.asked), "rows": sum(opened.index.counts().values())}


def reset_peak() -> None:
    """Let `read_peak` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> float:
    """Highest resident memory since it was last reset, in MiB. Linux only."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_opening(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
