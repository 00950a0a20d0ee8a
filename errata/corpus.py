"""Corpora: text and JSONL files whose passages say what a model must go on knowing. Streamed: never more than a line in memory.

A corpus is cut into blocks of bytes; a passage belongs to the block that its line begins in. The order of the blocks is shuffled by a
seed, and shard i of n takes every n-th of them from the i-th on: whoever knows the files reads its own shard and no other.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from errata.edits import canonical_json, digest_of
from errata.errors import InputError
from errata.placing import write_whole
from errata.validation import show_value
from errata.world import FILLER, make_world

WORLD, MAKESHIFT = "builtin:world", "builtin:makeshift"
"""Corpora that the project makes itself. The first states the facts of the built-in world as its base was trained on them. The second adds
sentences without facts and stands in where a user has no text at hand: a makeshift, so narrow that little of what a model of real language
knows is protected by it."""

_SUFFIXES = (".txt", ".jsonl")
_BLOCK = 1 << 16
_BLOCKS = 1 << 12
"""Blocks of a small corpus: enough for many shards of nearly equal sizes."""
_MANY = 1 << 20
"""Blocks of a very large one: their order is held in memory."""
_LONGEST = 8 << 20
"""Bytes of a line. No model reads that much of one passage."""
_MAKESHIFT = 6_000
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Fault:
    """A line that is no passage."""

    path: Path
    offset: int
    """Where it begins, in bytes."""
    reason: str

    def __str__(self) -> str:
        """`file:line: reason`. Reads the file up to there, since nobody counts lines otherwise."""
        with self.path.open("rb") as file:
            line, left = 1, self.offset
            while left and (data := file.read(min(left, _LONGEST))):
                line, left = line + data.count(b"\n"), left - len(data)
        return f"{self.path}:{line}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order, and their sizes in bytes when they were listed."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]

    def digest(self) -> str:
        """Names the contents, wherever the files lie: sha256 over kind and sha256 of each file, in order. Reads everything once.

        Raises:
            InputError: a file is gone.
        """
        kinds = []
        for path in self.files:
            content = hashlib.sha256()
            with _open(path) as file:
                while data := file.read(_LONGEST):
                    content.update(data)
            kinds.append([path.suffix == ".jsonl", content.hexdigest()])
        return digest_of(canonical_json(kinds))

    def read(
        self, shard: int = 0, shards: int = 1, *, seed: int = 0, on_fault: Callable[[Fault], None] = lambda _fault: None
    ) -> Iterator[str]:
        """The passages of one shard, in an order that depends on the corpus, `shards` and `seed` alone.

        Args:
            shard: from 0.
            on_fault: called with each line that cannot be read; the others go on.

        Raises:
            InputError: a file is gone, or has another size than when it was listed.
        """
        size = sum(self.sizes)
        step = max(min(_BLOCK, size // _BLOCKS), size // _MANY, 1)
        blocks = [(index, start) for index, length in enumerate(self.sizes) for start in range(0, length, step)]
        random.Random(seed).shuffle(blocks)
        opened: tuple[int, BinaryIO] | None = None
        try:
            for index, start in blocks[shard::shards]:
                if opened is None or opened[0] != index:
                    if opened:
                        opened[1].close()
                    opened = index, self._open(index)
                for offset, line in _read_lines(opened[1], start, min(start + step, self.sizes[index])):
                    found = _read_passage(self.files[index], offset, line)
                    if isinstance(found, Fault):
                        on_fault(found)
                    elif found:
                        yield found
        finally:
            if opened:
                opened[1].close()

    def _open(self, index: int) -> BinaryIO:
        file = _open(self.files[index])
        if (size := os.fstat(file.fileno()).st_size) != self.sizes[index]:
            file.close()
            raise InputError(f"{self.files[index]}: expected {self.sizes[index]} bytes as when the corpus was listed, found {size}")
        return file


def open_corpus(path: Path) -> Corpus:
    """The corpus at a path.

    Args:
        path: a `.jsonl` file (one object per line, its passage in the field `text`), any other file (one passage per line), or a folder,
            of which every `.txt` and `.jsonl` at any depth is taken in the order of their paths.

    Raises:
        InputError: there is nothing to read, or nothing in it can be read as text.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not found:
            raise InputError(f"{path}: expected *.txt or *.jsonl in this folder, found none")
    else:
        found = [path]
    sizes = []
    for file in found:
        with _open(file) as opened:
            sizes.append(os.fstat(opened.fileno()).st_size)
    corpus = Corpus(tuple(found), tuple(sizes))
    first: list[Fault] = []

    def note(fault: Fault) -> None:
        first[:] = first or [fault]

    if next(corpus.read(on_fault=note), None) is None:
        raise InputError(str(first[0]) if first else f"{path}: expected some text, found none")
    return corpus


def find_corpus(name: str, cache: Path) -> Corpus:
    """The corpus of a path, or one that the project makes (`WORLD`, `MAKESHIFT`), which is then written to the cache once.

    Raises:
        InputError: as `open_corpus`.
    """
    if name not in (WORLD, MAKESHIFT):
        return open_corpus(Path(name))
    text = "".join(f"{passage}\n" for passage in _make_passages(name)).encode()
    path = cache / "corpora" / f"{name.partition(':')[2]}-{digest_of(text)[:12]}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return open_corpus(path)


def _make_passages(name: str) -> Iterator[str]:
    if name == WORLD:
        yield from make_world().corpus(seed=0)
        return
    rng = random.Random(MAKESHIFT)
    for fact in make_world().corpus(seed=0, count=_MAKESHIFT):
        yield " ".join(rng.sample([fact, *rng.sample(FILLER, 3)], 4))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: expected a readable text file ({error.strerror or error})") from None


def _read_lines(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a block, each with its offset; of a very long one only the beginning."""
    offset = start
    if start:
        file.seek(start - 1)
        before = file.readline(end - start + 1)
        if not before.endswith(b"\n"):
            return  # one line covers the whole block
        offset += len(before) - 1
    else:
        file.seek(0)
    while offset < end and (line := file.readline(_LONGEST)):
        yield offset, line.removeprefix(_BOM) if offset == 0 else line
        offset += len(line)
        while not line.endswith(b"\n") and (line := file.readline(_LONGEST)):
            offset += len(line)


def _read_passage(path: Path, offset: int, line: bytes) -> str | Fault:
    try:
        text = line.decode("utf-8", "ignore" if len(line) == _LONGEST else "strict").strip()  # a cut may go through a character
        if path.suffix != ".jsonl" or not text:
            return text
        record = json.loads(text)
    except UnicodeDecodeError as error:
        return Fault(path, offset, f"expected UTF-8, found the byte {line[error.start : error.start + 1].hex()}")
    except (ValueError, RecursionError):
        return Fault(path, offset, f"expected one JSON object per line, found {show_value(text)}")
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"]).strip()
    return Fault(path, offset, f'expected an object with a passage as "text", found {show_value(record)}')
