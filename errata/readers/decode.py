"""Bytes to JSON values, a chunk at a time: memory stays bounded by the longest record, whatever the size of the file.

A fault stays as small as the form allows: in a file of lines it costs one line; in a JSON array the records before it go on.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from errata.validation import SHOWN

CHUNK = 1 << 16
MAX_RECORD = 8 << 20
"""Longest record, in bytes of a line or characters of an array element. An edit is a few hundred bytes."""

_SPACE = re.compile(r"[ \t\r\n]+")
_CUT_TOKEN = re.compile(r"[\w.+-]*\s*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_NEAR_END = 12
"""The longest token that a chunk border can cut in two without an unterminated string: an escaped surrogate pair."""


@dataclass(frozen=True, slots=True)
class Found:
    """One JSON value of a file, or a fault in its place."""

    line: int
    """1-based line where it starts."""
    index: int | None = None
    """0-based position in a JSON array; None in a file of lines."""
    value: Any = None
    fault: str | None = None


@dataclass(slots=True)
class _Decoder:
    """The standard decoder, except that it notices a key written twice in one object."""

    repeated: list[str] = field(default_factory=list)
    _json: json.JSONDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._json = json.JSONDecoder(object_pairs_hook=self._build)

    def _build(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            names = [name for name, _ in pairs]
            self.repeated.append(next(name for name in names if names.count(name) > 1))
        return built

    def decode(self, text: str) -> Any:
        self.repeated.clear()
        return self._json.decode(text)

    def decode_at(self, text: str, at: int) -> tuple[Any, int]:
        self.repeated.clear()
        return self._json.raw_decode(text, at)


def split_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (1-based number, line without its newline, whether a newline ended it); a line over MAX_RECORD is cut to one byte more."""
    number, held = 1, bytearray()
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            held += part[: MAX_RECORD + 1 - len(held)]
            yield number, bytes(held), True
            number += 1
            held.clear()
        held += rest[: MAX_RECORD + 1 - len(held)]
    if held:
        yield number, bytes(held), False


def decode_lines(chunks: Iterable[bytes]) -> Iterator[Found]:
    """One JSON value per line; blank lines are passed over, a bad line is a fault of its own."""
    decoder = _Decoder()
    for number, line, ended in split_lines(chunks):
        if not line.strip():
            continue
        if len(line) > MAX_RECORD:
            yield Found(number, fault=f"expected at most {MAX_RECORD} bytes in one record, found more")
            continue
        try:
            text = line.decode().strip()
            value = decoder.decode(text)
        except UnicodeDecodeError as error:
            yield Found(number, fault=f"expected UTF-8, found byte 0x{line[error.start]:02x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            if not ended and _is_cut(error):
                yield Found(number, fault="expected a whole record, found the end of the file inside it")
            else:
                yield Found(number, fault=_explain_syntax(error, f"column {error.pos + 1}"))
        except (ValueError, RecursionError) as error:
            yield Found(number, fault=_explain_refused(error))
        else:
            yield Found(number, value=value, fault=_explain_repeated(decoder))


def decode_values(chunks: Iterable[bytes]) -> Iterator[Found]:
    """The elements of a JSON array, or JSON values that follow each other, however they are laid out over lines.

    After a fault in the syntax nothing says where the next record starts: what was read before it stands, the rest is one fault.
    """
    window, decoder = _Window(chunks), _Decoder()
    in_array = window.skip_space() == "["
    if in_array:
        window.advance(1)
    index = 0
    while (char := window.skip_space()) or in_array:
        if in_array and char == "]":
            in_array = False
            window.advance(1)
            if window.skip_space():
                yield Found(window.line, fault=f"expected the end of the file after ']', found {window.peek()!r}; what follows is not read")
            return
        if in_array and index:
            if char and char != ",":
                reason = f"expected ',' or ']' after record [{index - 1}], found {window.peek()!r}; what follows is not read"
                yield Found(window.line, fault=reason)
                return
            window.advance(len(char))
            char = window.skip_space()
        line = window.line
        if not char:
            yield Found(line, fault=f"expected ']', found the end of the file; whole records before it: {index}")
            return
        try:
            value, text = window.take_value(decoder)
        except json.JSONDecodeError as error:
            if window.ended and _is_cut(error):
                reason = f"expected a whole record, found the end of the file (line {window.last_line}) inside it"
            elif len(window.text) - window.at > MAX_RECORD:
                reason = f"expected at most {MAX_RECORD} characters in one record, found more"
            else:
                reason = window.locate(error)
            yield Found(line, index, fault=f"{reason}; whole records before it: {index}; what follows is not read")
            return
        except (ValueError, RecursionError) as error:
            yield Found(line, index, fault=f"{_explain_refused(error)}; what follows is not read")
            return
        escaped = _ESCAPED_BYTE.search(text)
        fault = f"expected UTF-8, found byte 0x{ord(escaped[0]) - 0xDC00:02x}" if escaped else _explain_repeated(decoder)
        yield Found(line, index, value, fault)
        index += 1


class _Window:
    """The decoded text around the record being read: grows on demand, forgets what was read.

    Bytes that are not UTF-8 become lone surrogates, so that the record they stand in can be refused and the others read.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._before = 0  # characters of the current line in front of `text`

    @property
    def last_line(self) -> int:
        return self.line + self.text.count("\n", self.at)

    def advance(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def grow(self) -> bool:
        """Forget what was read and append at least as much as is unread, so that long records cost linear time."""
        rest, newline = len(self.text) - self.at, self.text.rfind("\n", 0, self.at)
        self._before = self.at - newline - 1 if newline >= 0 else self._before + self.at
        parts, added = [self.text[self.at :]], 0
        while not self.ended and added <= rest:
            chunk = next(self._chunks, None)
            self.ended = chunk is None
            parts.append(self._decoder.decode(chunk or b"", final=self.ended))
            added += len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return added > 0

    def skip_space(self) -> str:
        """Move to the next character that is not white space; empty at the end."""
        while True:
            if space := _SPACE.match(self.text, self.at):
                self.advance(space.end() - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def locate(self, error: json.JSONDecodeError) -> str:
        line, newline = self.line + self.text.count("\n", self.at, error.pos), self.text.rfind("\n", 0, error.pos)
        column = error.pos - newline if newline >= 0 else self._before + error.pos + 1
        return _explain_syntax(error, f"line {line}, column {column}")

    def peek(self) -> str:
        return self.text[self.at : self.at + SHOWN // 2]

    def take_value(self, decoder: _Decoder) -> tuple[Any, str]:
        """Read one value; return it with its text.

        Raises:
            json.JSONDecodeError: the text is not JSON, ends inside the value, or the value is longer than MAX_RECORD.
        """
        while True:
            try:
                value, end = decoder.decode_at(self.text, self.at)
            except json.JSONDecodeError as error:
                if not _may_go_on(error) or len(self.text) - self.at > MAX_RECORD or self.ended:
                    raise
                self.grow()
                continue
            if end == len(self.text) and not isinstance(value, dict | list | str) and not self.ended:
                self.grow()
                continue  # a number that touches the border may go on behind it
            text = self.text[self.at : end]
            self.advance(end - self.at)
            return value, text


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend the fault: it lies where a chunk border may have cut a string or a token in two."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _NEAR_END


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text ends inside a value, rather than being wrong in its last characters."""
    return error.msg.startswith(("Unterminated string", "Invalid \\u")) or bool(_CUT_TOKEN.fullmatch(error.doc, error.pos))


def _explain_syntax(error: json.JSONDecodeError, where: str) -> str:
    found = error.doc[error.pos : error.pos + SHOWN // 2].partition("\n")[0]
    return f"expected JSON, found {repr(found) if found else 'the end of the line'} at {where} ({error.msg})"


def _explain_refused(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "expected a flat record, found one nested too deeply to read"
    return f"expected JSON, found a value that cannot be read ({str(error).split(';')[0]})"


def _explain_repeated(decoder: _Decoder) -> str | None:
    return f"expected each field once, found {decoder.repeated[0][:SHOWN]!r} twice" if decoder.repeated else None
