"""Faults of everything around a run: another machine, clocks, a store that fails now and then or lists late, a disk that is full."""

import errno
import http.client
import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pytest

from benchmarks.expected import Expected
from benchmarks.invariants import Account, check_stream
from benchmarks.tiny_base import start_root
from errata.edits import Edit, digest_of
from registry.history import open_history
from registry.inbox import drop_file
from registry.keeping import open_archived, open_pins
from registry.storage.base import Entry
from registry.storage.local import LocalStorage
from registry.stream import open_stream

Make = Callable[..., Edit]
HOME = Path(__file__).parents[2]


def write_file(edits: list[Edit]) -> bytes:
    return "".join(edit.model_dump_json(exclude_none=True) + "\n" for edit in edits).encode()


def look(root: str, *batches: list[Edit]) -> list[str]:
    """What is wrong with a stream into which these files were to be written, in this order."""
    expected, account = Expected(), Account()
    account.read_on(open_history(root, "main"))
    for edits in batches:
        expected.files[digest_of(write_file(edits))] = len(edits)
        expected.apply(edits)
    return check_stream(expected, account, whole=True)


def leave(root: str, name: str, edits: list[Edit]) -> None:
    open_stream(root, "main").storage.create(f"streams/main/inbox/{name}.jsonl", write_file(edits))


# Two machines


@pytest.mark.parametrize("storage", [pytest.param("local", marks=pytest.mark.long), "s3"])
def test_two_machines_apply_at_once(tmp_path: Path, storage: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_") or name == "ERRATA_TEST_S3_ENDPOINT"}
    variables = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HOME)}
    command = [sys.executable, str(Path(__file__).with_name("rival_runs.py")), storage, str(tmp_path)]
    run = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    assert None not in told["machines"], told["output"]
    assert sum(machine["commits"] for machine in told["machines"]) == 6
    assert sum(machine["conflicts"] for machine in told["machines"]) >= 1
    assert told["wrong"] == []


# Clocks


@pytest.mark.long
def test_clocks_that_differ_change_no_order(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> None:
    """Writers whose clocks are days behind and a month ahead, and then a collection: order is the log's, age the storage's."""
    import tasks.committing
    from flows.keep import collect_garbage

    monkeypatch.setenv("ERRATA_KEEP__RECENT", "1")
    batches = [[make_edit(0), make_edit(1)], [make_edit(0, answer=1)], [make_edit(0, answer=2), make_edit(2)], [make_edit(1, answer=3)]]
    for number, (days, edits) in enumerate(zip((0, -3, -1, 40), batches, strict=True)):
        now = datetime.now(UTC) + timedelta(days=days)
        monkeypatch.setattr(tasks.committing, "datetime", SimpleNamespace(now=lambda _zone, now=now: now))
        leave(str(desk.root), str(number), edits)
        assert [summary.decision for summary in desk.apply()] == ["accept"]
    stream = desk.open()
    times = [stream.log.read(seq).time for seq in range(1, 5)]
    assert times != sorted(times)
    assert look(str(desk.root), *batches) == []
    summary = collect_garbage("main")
    assert summary.deleted == {}
    assert not {2, 3, 4} & set(open_archived(stream.storage, "main").read()), "each is the last of its day, and none is too old"
    assert look(str(desk.root), *batches) == []


# A store that answers 500 and 503


class Moody:
    """A server between us and S3 that answers 500 or 503 now and then: before it passes a request on, or instead of the answer."""

    def __init__(self, endpoint: str) -> None:
        self.target = urlsplit(endpoint)
        self.chance, self.rate, self.faults = random.Random(0), 0.0, 0
        self.down_after: int | None = None
        """Requests that change something until nothing is answered any more."""

    def draw(self, method: str) -> tuple[bool, int]:
        """Whether to pass a request on, and the status to answer in place of the true one, or 0."""
        if self.down_after is not None and method in ("PUT", "DELETE"):
            self.down_after -= 1
        down = self.down_after is not None and self.down_after < 0
        if not down and self.chance.random() >= self.rate:
            return True, 0
        self.faults += 1
        return not down and self.chance.random() < 0.5, self.chance.choice((500, 503))


@pytest.fixture
def moody(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    moody = Moody(os.environ["AWS_ENDPOINT_URL_S3"])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            passed, status = moody.draw(self.command)
            headers, content = [("Content-Type", "application/xml")], b"<Error><Code>InternalError</Code></Error>"
            if passed:
                inner = http.client.HTTPConnection(moody.target.netloc, timeout=60)
                sent = {name: value for name, value in self.headers.items() if name != "Expect"}
                inner.request(self.command, self.path, body, sent)
                answer = inner.getresponse()
                read = answer.read()
                if not status:
                    skipped = ("transfer-encoding", "connection", "date", "server", "content-length")
                    headers, content = [pair for pair in answer.getheaders() if pair[0].lower() not in skipped], read
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                    status = answer.status
                    inner.close()
                    return self._send(status, headers, content, length)
                inner.close()
            return self._send(status, headers, content, None)

        def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer

        def log_message(self, format: str, *values: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _seconds: None))
    yield moody
    server.shutdown()
    server.server_close()


@pytest.fixture
def far(desk: Any, moody: Moody, s3_bucket: str, editable_folder: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> str:
    """URL of a root in the bucket, which is where the flows and the command look; MLflow stays here."""
    home, root = desk.root.parent / "far", f"s3://{s3_bucket}/{uuid.uuid4().hex}"
    home.mkdir()
    start_root(root, editable_folder, home)
    monkeypatch.setenv("ERRATA_ROOT", root)
    monkeypatch.setenv("ERRATA_MLFLOW__TRACKING_URI", f"sqlite:///{desk.root / 'mlflow.db'}")
    return root


def test_a_store_that_fails_now_and_then_delays_a_batch_and_nothing_more(far: str, moody: Moody, desk: Any, make_edit: Make) -> None:
    from flows.keep import collect_garbage

    batches = [[make_edit(0), make_edit(1)], [make_edit(0, answer=2), make_edit(2)]]
    moody.rate = 0.15
    for number, edits in enumerate(batches):
        drop_file(open_stream(far, "main"), f"{number}.jsonl", write_file(edits))
        assert [summary.decision for summary in desk.apply()] == ["accept"]
    collect_garbage("main")
    assert moody.faults > 20
    moody.rate = 0.0
    assert look(far, *batches) == []


@pytest.mark.parametrize("room", [3, pytest.param(14, marks=pytest.mark.long)])
def test_a_store_that_stays_away_is_named_and_the_next_run_goes_on(
    far: str, moody: Moody, make_edit: Make, errata: Callable[..., Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect.task_engine.sleep", lambda _seconds: None, raising=False)
    edits = [make_edit(0), make_edit(1)]
    leave(far, "one", edits)
    moody.down_after = room
    ran = errata("apply")
    assert ran.code == 1 and far in ran.err and "expected to " in ran.err, ran.err
    moody.down_after = None
    assert errata("apply").code == 0
    assert look(far, edits) == []


# A store that lists late


class Listing:
    """Listings that stand still between `freeze` and `thaw`: they show neither what has come since nor that something has gone."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, Entry | None]] = []
        """Keys that were created, and deleted ones with what a listing says of them."""
        self.since: int | None = None

    def freeze(self) -> None:
        self.since = len(self.changes)

    def thaw(self) -> None:
        self.since = None


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Listing:
    listing = Listing()
    create, delete, real = LocalStorage.create, LocalStorage.delete, LocalStorage.list

    def create_noted(self: LocalStorage, key: str, data: bytes) -> None:
        create(self, key, data)
        listing.changes.append((key, None))

    def delete_noted(self: LocalStorage, key: str) -> None:
        found = self.find(key)
        delete(self, key)
        if found:
            listing.changes.append((key, found))

    def list_late(self: LocalStorage, prefix: str) -> Iterator[Entry]:
        shown = {entry.key: entry for entry in real(self, prefix)}
        for key, gone in reversed(listing.changes[listing.since :] if listing.since is not None else []):
            if gone is None:
                shown.pop(key, None)
            elif key.startswith(prefix):
                shown[key] = gone
        yield from (shown[key] for key in sorted(shown))

    for name, function in (("create", create_noted), ("delete", delete_noted), ("list", list_late)):
        monkeypatch.setattr(LocalStorage, name, function)
    return listing


def grow_old(root: Path, days: float) -> None:
    for path in (root / "streams").rglob("*"):
        if path.is_file():
            moment = path.stat().st_mtime - days * 86_400
            os.utime(path, (moment, moment))


@pytest.mark.long
def test_a_listing_that_is_late_hides_nothing_that_counts(
    desk: Any, make_edit: Make, listing: Listing, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    from flows.keep import collect_garbage

    monkeypatch.setenv("ERRATA_KEEP__RECENT", "1")
    monkeypatch.setenv("ERRATA_KEEP__DAILY_DAYS", "0")
    root, batches = str(desk.root), [[make_edit(0), make_edit(1)], [make_edit(0, answer=2), make_edit(2)], [make_edit(3)]]
    for number, edits in enumerate(batches):
        listing.freeze()
        leave(root, str(number), edits)
        assert desk.apply() == [], "a file that is not listed yet waits"
        listing.freeze()
        assert [summary.decision for summary in desk.apply()] == ["accept"]
        assert open_stream(root, "main").head.seq == number + 1, "the head is read, not listed"
        assert desk.apply() == [], "a file that is listed still, and gone, is passed over"
        listing.thaw()
        assert look(root, *batches[: number + 1]) == []
    deleted = 0
    for number, edits in enumerate(([make_edit(5)], [make_edit(6)])):
        grow_old(desk.root, 3)
        leave(root, f"late-{number}", edits)
        batches.append(edits)
        pins = open_pins(desk.open().storage, "main")
        pins.write(1, "audit")
        listing.freeze()
        pins.remove(1)
        desk.apply()
        deleted += sum(count for count, _ in collect_garbage("main").deleted.values())
        listing.thaw()
        assert look(root, *batches) == []
    assert deleted > 0


def test_a_hint_that_is_listed_still_and_gone_is_passed_over(
    desk: Any, make_edit: Make, listing: Listing, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    """As between two machines: one has committed the pairs that the other has just seen waiting."""
    import flows.edit

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    monkeypatch.setenv("ERRATA_APPLY__BATCH_SIZE", "2")
    batches = [[make_edit(0), make_edit(1)], [make_edit(2), make_edit(3)]]
    for number, edits in enumerate(batches):
        leave(str(desk.root), str(number), edits)
    with monkeypatch.context() as patch:
        patch.setattr(flows.edit, "merge_pairs", die)
        with pytest.raises(RuntimeError):
            desk.apply()
    listing.freeze()
    assert [summary.decision for summary in desk.apply()] == ["accept", "accept"]
    listing.thaw()
    assert look(str(desk.root), *batches) == []


# A disk that is full


def fill(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """After so many files nothing can be written any more: the beginning of the next one is, and that is it."""
    write, count = LocalStorage._write, iter(range(10_000))

    def write_some(self: LocalStorage, path: Path, source: BinaryIO) -> None:
        if next(count) >= room:
            path.write_bytes(source.read(10))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, path, source)

    monkeypatch.setattr(LocalStorage, "_write", write_some)


@pytest.mark.parametrize("room", [pytest.param(0, marks=pytest.mark.long), 4, pytest.param(9, marks=pytest.mark.long)])
def test_a_disk_that_is_full_is_named_and_the_next_run_goes_on(
    desk: Any, make_edit: Make, errata: Callable[..., Any], room: int, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    first, second = [make_edit(0), make_edit(1)], [make_edit(0, answer=2), make_edit(2)]
    leave(str(desk.root), "one", first)
    desk.apply()
    leave(str(desk.root), "two", second)
    with monkeypatch.context() as patch:
        fill(patch, room)
        ran = errata("apply")
    assert ran.code == 1 and "No space left on device" in ran.err, ran.err
    assert look(str(desk.root), first)[-1].startswith("inbox: two.jsonl waits still")
    assert not list((desk.root / "streams").rglob(".*")), "no half a file is left"
    assert errata("apply").code == 0
    assert look(str(desk.root), first, second) == []


def test_an_mlflow_without_room_shows_the_batch_later(
    desk: Any, make_edit: Make, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    from registry.runs import MlflowClient

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    edits = [make_edit(0), make_edit(1)]
    leave(str(desk.root), "one", edits)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", full)
        ran = errata("apply")
    assert ran.code == 1 and "No space left on device" in ran.err, ran.err
    assert desk.open().head.seq == 1, "it is committed"
    assert errata("apply").code == 0
    assert look(str(desk.root), edits) == []
