"""Files of edits: what a user submits, and what waits in the inbox. Every record comes out as an edit or as a refusal, in order.

A JSON array is read element by element, anything else line by line; what cannot be read names file, line or index, and field.
"""

from collections.abc import Container, Iterable, Iterator
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from errata.edits import Refusal, Submission
from errata.errors import InputError
from errata.readers.decode import CHUNK, Found, decode_lines, decode_values, split_lines
from errata.readers.forms import describe_forms
from errata.readers.records import read_record
from errata.validation import show_value

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD_LINES = 20
"""Lines among which one must look like a record; a file without one is not a file of edits, and is refused once, not line by line."""


def read_edits(path_or_stream: str | Path | BinaryIO, name: str | None = None) -> Iterator[Submission | Refusal]:
    """Read every record of a file in a known form, in order, holding one chunk at a time.

    Args:
        path_or_stream: a file, or an open binary stream (which stays open).
        name: what messages and origins call it; default: the path as given, or the stream's name.

    Raises:
        InputError: there is no such file, or it cannot be opened.
    """
    if not isinstance(path_or_stream, str | Path):
        return _read_stream(path_or_stream, name or str(getattr(path_or_stream, "name", "input")))
    name = name or _spell(path_or_stream)
    try:
        stream = Path(path_or_stream).open("rb")  # noqa: SIM115  closed by the generator that reads it
    except OSError as error:
        raise InputError(f"{name}: expected a readable file of edits ({error.strerror or error})") from None
    return _read_and_close(stream, name)


def read_lines(data: bytes, name: str, skip: Container[int] = ()) -> Iterator[tuple[int, Submission | Refusal]]:
    """Read an inbox file, one record per line; yield (1-based line, outcome), leaving out the lines in `skip`.

    Blank lines are no rows and are not yielded. Every inbox file has at least one row: an empty one, or one that is no file of
    lines, is refused as a whole at line 1, so that intake can settle it.
    """
    head, chunks = _read_head(_chunk(BytesIO(data)))
    fault = _refuse_head(head)
    if not fault and _is_spread(head):
        fault = "expected one record per line, found JSON laid out over the whole file; `errata submit` reads it"
    if fault:
        if 1 not in skip:
            yield 1, Refusal(origin=name, reason=fault)
        return
    for found in decode_lines(chunks):
        if found.line not in skip:
            yield found.line, _settle(found, name)


def _read_and_close(stream: BinaryIO, name: str) -> Iterator[Submission | Refusal]:
    with stream:
        yield from _read_stream(stream, name)


def _read_stream(stream: BinaryIO, name: str) -> Iterator[Submission | Refusal]:
    head, chunks = _read_head(_chunk(stream))
    if fault := _refuse_head(head):
        yield Refusal(origin=name, reason=fault)
        return
    for found in decode_values(chunks) if _is_spread(head) else decode_lines(chunks):
        yield _settle(found, name)


def _settle(found: Found, name: str) -> Submission | Refusal:
    origin = f"{name}:{found.line}" if found.index is None else f"{name}[{found.index}]"
    return Refusal(origin=origin, reason=found.fault) if found.fault else read_record(found.value, origin)


def _chunk(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


def _read_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterable[bytes]]:
    """The first chunk that is not blank, without a byte order mark, and all chunks from there on."""
    head = next(chunks, b"").removeprefix(_BOM)
    blank: list[bytes] = []
    while not head.strip() and (chunk := next(chunks, None)):
        blank.append(head)  # kept, because lines are counted
        head = chunk
    return head, chain(blank, [head], chunks)


def _refuse_head(head: bytes) -> str | None:
    """Why the file as a whole is no file of edits, if so."""
    if not head.strip():
        return "expected edits, found an empty file"
    if head.startswith(_UTF16):
        return "expected UTF-8, found UTF-16; convert it, for example with `iconv -f UTF-16 -t UTF-8`"
    lines = [line.strip() for _, line, _ in islice(split_lines([head]), _HEAD_LINES)]
    if any(line.startswith((b"{", b"[")) for line in lines):
        return None
    first = next(line for line in lines if line).decode(errors="replace")
    return f"expected JSON lines or a JSON array in {describe_forms()}; found {show_value(first)}"


def _is_spread(head: bytes) -> bool:
    """Whether records are laid out regardless of lines: a JSON array, or objects as `jq` and `json.dumps(indent=…)` write them.

    A first line that only looks so (a damaged record, an array where a record should be) does not spoil the lines after it.
    """
    lines = (line.strip() for _, line, _ in split_lines([head]))
    first, second = islice(chain(filter(None, lines), (b"", b"")), 2)
    if first == b"{":
        return not second.startswith(b"{")
    return first.startswith(b"[") and not (first.endswith(b"]") and second.startswith(b"{"))


def _spell(path: str | Path) -> str:
    """A path that can be printed and stored, whatever bytes are in its name."""
    return str(path).encode(errors="backslashreplace").decode()
