"""Bytes to JSON values: streams in bounded memory, and a fault costs as little as the form allows."""

import json
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.readers import decode
from errata.readers.decode import Found, decode_lines, decode_values

RECORDS = [{"a": "xé\u0301\U0001f600\n", "b": [1, -2.5e3, True, None, {"c": '\\"'}]}, {"z": "q"}]
ARRAYS = [
    json.dumps(RECORDS).encode(),
    json.dumps(RECORDS, indent=1).encode(),
    json.dumps(RECORDS, ensure_ascii=False).encode(),
    b"\r\n" + json.dumps(RECORDS, indent=2).replace("\n", "\r\n").encode() + b"\r\n ",
]
_TEXT = st.text(max_size=6)
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _TEXT, st.lists(_TEXT, max_size=2))
_RECORDS = st.lists(st.dictionaries(_TEXT, _VALUES, max_size=3), max_size=4)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@given(_RECORDS, st.integers(1, 40), st.sampled_from([None, 0, 3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_array_is_read_whatever_its_layout_and_chunks(
    records: list[dict[str, object]], size: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    found = list(decode_values(cut(data, size)))
    assert [(f.index, f.value, f.fault) for f in found] == [(index, record, None) for index, record in enumerate(records)]


@given(_RECORDS, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_lines_are_read_whatever_the_chunks(records: list[dict[str, object]], size: int) -> None:
    data = b"\r\n".join(json.dumps(record, ensure_ascii=False).encode() for record in records)
    found = list(decode_lines(cut(data, size)))
    assert [(f.line, f.value, f.fault) for f in found] == [(line, record, None) for line, record in enumerate(records, start=1)]


@pytest.mark.parametrize("data", ARRAYS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_every_cut_of_an_array_keeps_the_whole_records_and_says_where_it_ends(data: bytes, size: int) -> None:
    body = data.rstrip()
    for length in range(data.index(b"[") + 1, len(body)):
        *whole, last = decode_values(cut(body[:length], size))
        assert [found.value for found in whole] == RECORDS[: len(whole)]
        assert not any(found.fault for found in whole)
        assert last.fault is not None
        assert "found the end of the file" in last.fault
        assert f"whole records before it: {len(whole)}" in last.fault


@pytest.mark.parametrize("data", ARRAYS)
def test_records_know_their_line(data: bytes) -> None:
    lines = [found.line for found in decode_values([data])]
    starts = [data.index(b'"a"'), data.index(b'"z"')]
    assert lines == [data[: data.rindex(b"{", 0, start)].count(b"\n") + 1 for start in starts]


@pytest.mark.parametrize(
    ("data", "whole", "said"),
    [
        (b'[{"a":1},]', 1, "found ']' at line 1, column 10"),
        (b'[{"a":1},\n{"a" 1},{"b":2}]', 1, "at line 2, column 6"),
        (b'[{"a":1} {"b":2}]', 1, "expected ',' or ']' after record [0], found '{"),
        (b'[{"a":1}] x', 1, "expected the end of the file after ']', found 'x'"),
        (b"[" * 100_000, 0, "nested too deeply"),
        (b'[{"a":' + b"9" * 5_000 + b"}]", 0, "a value that cannot be read"),
    ],
)
def test_after_a_fault_in_an_array_the_rest_is_one_fault(data: bytes, whole: int, said: str) -> None:
    for size in (3, 1000):
        *records, last = decode_values(cut(data, size))
        assert len(records) == whole
        assert last.fault is not None
        assert said in last.fault
        assert "not read" in last.fault


def test_a_bad_line_costs_one_line() -> None:
    data = b'{"a":1}\n{"a":\n\n{"a":"\xff"}\n{"a":1,"b":{"c":1,"c":2}}\n' + b"[" * 100_000 + b'\n{"a":2}\n{"a":'
    faults = {found.line: found.fault for found in decode_lines([data])}
    assert faults == {
        1: None,
        2: "expected JSON, found the end of the line at column 6 (Expecting value)",
        4: "expected UTF-8, found byte 0xff at column 7",
        5: "expected each field once, found 'c' twice",
        6: "expected a flat record, found one nested too deeply to read",
        7: None,
        8: "expected a whole record, found the end of the file inside it",
    }


def test_bytes_that_are_not_utf8_cost_one_record_of_an_array() -> None:
    found = list(decode_values(cut(b'[{"a":"caf\xe9"},{"a":"caf\xc3\xa9"}]', 1)))
    assert found == [Found(1, 0, {"a": "caf\udce9"}, "expected UTF-8, found byte 0xe9"), Found(1, 1, {"a": "café"})]


def test_a_record_without_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_RECORD", 1_000)
    long = b'{"a":"' + b"x" * 5_000 + b'"}'
    faults = [found.fault for found in decode_lines(cut(long + b'\n{"a":1}', 64))]
    assert faults == ["expected at most 1000 bytes in one record, found more", None]
    (fault,) = (found.fault for found in decode_values(cut(b"[" + long + b"]", 64)))
    assert fault is not None
    assert fault.startswith("expected at most 1000 characters in one record, found more")


@pytest.mark.parametrize("form", ["lines", "array"])
def test_memory_does_not_grow_with_the_file(form: str) -> None:
    record = json.dumps({"text": "x" * 900}).encode()
    chunks = 400  # of 64 records: 24 MB

    def stream() -> Iterator[bytes]:
        yield b"[" if form == "array" else b""
        for number in range(chunks):
            yield (b"," if form == "array" and number else b"") + (b"," if form == "array" else b"\n").join([record] * 64)
            yield b"\n"
        yield b"]" if form == "array" else b""

    tracemalloc.start()
    try:
        found = sum(found.fault is None for found in (decode_values if form == "array" else decode_lines)(stream()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == chunks * 64
    assert peak < 3_000_000
