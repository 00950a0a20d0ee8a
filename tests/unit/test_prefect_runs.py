"""A server that has just started answers 503 while its own services write: that is waited for, and nothing else is."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import HTTPError

import pytest

from errata.errors import ErrataError
from flows import prefect_runs
from flows.prefect_runs import call_server, settle_past

ANSWERS: list[int] = []


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code = ANSWERS.pop(0)
        self.send_response(code)
        self.end_headers()
        if code == 200:
            self.wfile.write(b"[1]")

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(prefect_runs, "_PAUSES", (0.0, 0.0))
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_server_is_waited_for(api: str) -> None:
    ANSWERS[:] = [503, 503, 200]
    assert call_server(api, "GET", "flows") == [1]
    ANSWERS[:] = [503, 503, 503]
    with pytest.raises(HTTPError):
        call_server(api, "GET", "flows")
    ANSWERS[:] = [500, 200]
    with pytest.raises(HTTPError):
        call_server(api, "GET", "flows")
    assert ANSWERS == [200]


def test_what_is_gone_need_not_be_removed(api: str) -> None:
    ANSWERS[:] = [404]
    assert call_server(api, "DELETE", "flow_runs/1") is None


def test_a_server_that_refuses_is_an_error_of_ours(api: str) -> None:
    ANSWERS[:] = [500]
    with pytest.raises(ErrataError, match="expected runs that were left open to be closed"):
        settle_past(api)
