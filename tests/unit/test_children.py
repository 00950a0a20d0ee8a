"""The processes of `errata up` end, all of them, whoever their parent is by now and whatever they think of signals."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from errata.errors import ErrataError, InputError
from flows.children import end_family, find_family, start_child, take_port, wait_until_healthy

SLEEP = "import time; time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    end_family(tmp_path, (), lambda: True)


def start(home: Path, code: str, name: str = "child") -> subprocess.Popen[bytes]:
    return start_child(name, [sys.executable, "-c", code], home, dict(os.environ), home)


def test_whoever_its_parent_is(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    start(home, PARENT).wait()
    start(home, SLEEP)
    other = tmp_path_factory.mktemp("other")
    stranger = start(other, SLEEP)
    assert len(find_family(home)) == 2, "the parent is gone, its child is not"
    end_family(home, (), lambda: False)
    assert find_family(home) == []
    assert stranger.poll() is None
    end_family(other, (), lambda: True)


def test_who_does_not_listen_is_killed_when_somebody_is_in_a_hurry(home: Path) -> None:
    start(home, DEAF)
    while "deaf" not in (home / "child.log").read_text():
        time.sleep(0.05)
    begun = time.monotonic()
    end_family(home, (), lambda: True)
    assert time.monotonic() - begun < 10
    assert find_family(home) == []


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: expected a free one"):
            take_port(port, 1)
        assert take_port(None, port) not in (port, 0)
    assert take_port(port, 1) == port


def test_another_server_at_that_port_is_not_ours(home: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    child = start(home, "import time; time.sleep(3); print('address already in use'); raise SystemExit(1)", "server")
    try:
        with pytest.raises(ErrataError, match="(?s)found exit code 1:.*already in use"):
            wait_until_healthy(f"http://127.0.0.1:{server.server_port}/", "server", child, home, lambda: None)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_of_ours_is_found(home: Path) -> None:
    port = take_port(None, 0)
    serve = f"HTTPServer(('127.0.0.1', {port}), SimpleHTTPRequestHandler).serve_forever()"
    child = start(home, f"from http.server import HTTPServer, SimpleHTTPRequestHandler; {serve}", "server")
    wait_until_healthy(f"http://127.0.0.1:{port}/", "server", child, home, lambda: None)


def test_a_server_that_ends_is_not_waited_for(home: Path) -> None:
    child = start(home, "print('no disk left'); raise SystemExit(3)", "server")
    with pytest.raises(ErrataError, match=r"(?s)expected server at .*, found exit code 3:.*no disk left"):
        wait_until_healthy("http://127.0.0.1:9/health", "server", child, home, lambda: None)
