"""S3 under faults that moto does not produce: a scripted server answers with what real ones answer now and then."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from errata.errors import KeyExistsError, StorageError
from registry.storage.s3 import S3Storage


class Script:
    """The answers still to be given, and the requests that came."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.requests: list[str] = []


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # boto3 asks whether to send a body; HTTP/1.0 would let it wait for the answer.

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            condition = " if-none-match" if self.headers.get("If-None-Match") == "*" else ""
            script.requests.append(f"{self.command} {self.path}{condition}")
            status, code = script.answers.pop(0)
            body = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode() if status >= 300 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = _answer

        def log_message(self, format: str, *values: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield script
    assert script.answers == [], "every answer was asked for"
    server.shutdown()
    server.server_close()


PUT = "PUT /bucket/prefix/a if-none-match"
HEAD = "HEAD /bucket/prefix/a"


def test_a_busy_server_is_asked_again(script: Script) -> None:
    script.answers = [(500, "InternalError"), (503, "SlowDown"), (200, "")]
    S3Storage("s3://bucket/prefix/").create("a", b"1")
    assert script.requests == [PUT] * 3


def test_a_repetition_may_meet_its_own_first_try(script: Script) -> None:
    script.answers = [(503, "SlowDown"), (412, "PreconditionFailed")]
    with pytest.raises(KeyExistsError):
        S3Storage("s3://bucket/prefix").create("a", b"1")


def test_a_write_in_flight_that_wins_means_the_key_exists(script: Script) -> None:
    script.answers = [(409, "ConditionalRequestConflict"), (200, "")]
    with pytest.raises(KeyExistsError):
        S3Storage("s3://bucket/prefix").create("a", b"1")
    assert script.requests == [PUT, HEAD]


def test_a_write_in_flight_that_fails_leaves_the_key_to_us(script: Script) -> None:
    script.answers = [(409, "ConditionalRequestConflict"), (404, ""), (200, "")]
    S3Storage("s3://bucket/prefix").create("a", b"1")
    assert script.requests == [PUT, HEAD, PUT]


def test_a_server_that_stays_busy_is_an_error(script: Script) -> None:
    script.answers = [(503, "SlowDown")] * 5
    with pytest.raises(StorageError, match=r"s3://bucket/prefix: expected to create 'a': .*SlowDown"):
        S3Storage("s3://bucket/prefix").create("a", b"1")


@pytest.mark.parametrize("code", ["NoSuchBucket", "AccessDenied"])
def test_what_is_not_a_missing_key_is_an_error(script: Script, code: str) -> None:
    script.answers = [(404 if code == "NoSuchBucket" else 403, code)]
    with pytest.raises(StorageError, match=code) as caught:
        S3Storage("s3://bucket/prefix").read("a")
    assert type(caught.value) is StorageError
